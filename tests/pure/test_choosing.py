"""The automatic schedule: measured in the first steps, chosen between two of them, and the same bits throughout."""

from __future__ import annotations

import pytest

from generator_cases import DEEP, Run, same_bits, train
from parity_cases import batch
from triloom.choosing import Auto
from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder
from triloom.placement import zero3
from triloom.schedules import one_f_one_b
from triloom.simulate import simulate
from triloom.spans import Spans
from triloom.timing import make_timing

AT_ONCE = Auto(warmup=0, steps=1, effort=10_000)


@pytest.mark.parametrize("run", [Run("llama", pp=2, microbatches=5), Run("gpt2", dp=2, pp=3, microbatches=2)], ids=str)
def test_the_same_bits_before_and_after_the_choice(run: Run) -> None:
    world = run.dp * run.pp * run.tp
    got = run_threads(world, lambda group: train(group, run, AT_ONCE))
    want = run_threads(world, lambda group: train(group, run, one_f_one_b))
    for one, other in zip(got, want, strict=True):
        same_bits(one, other)


def _engine(world: Group, schedule: str | Auto, spans: Spans | None = None) -> Engine:
    model = decoder(DEEP["llama"])
    return Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=make_mesh(world.size, pp=world.size),
        schedule=schedule, microbatches=4, placement=zero3(), record=spans,
    )  # fmt: skip


def test_every_rank_runs_what_was_chosen_and_spans_follow() -> None:
    def body(world: Group) -> tuple[list[str], list[bool]]:
        spans = Spans()
        engine = _engine(world, AT_ONCE, spans)
        timing = make_timing(engine, spans, world, 3)
        names, chosen = [], []
        for step in range(3):
            engine.step(*batch(step))
            figures = timing.step(step)
            assert figures is not None and 0 <= figures.bubble < 1
            engine.evaluate(*batch(step))
            names.append(engine.program.to_csv())
            chosen.append(engine.chosen is not None)
        assert engine.chosen is not None
        assert "bubble" in engine.chosen.text
        held = simulate(engine.chosen.program).peak
        assert max(held) <= 3  # microbatches that the first of three ranks holds under 1F1B
        engine.close()
        return names, chosen

    told = run_threads(3, body)
    assert all(one == told[0] for one in told)
    names, chosen = told[0]
    assert chosen == [False, True, True]
    assert names[1] == names[2]


def test_the_first_step_is_not_measured() -> None:
    def body(world: Group) -> list[bool]:
        engine = _engine(world, Auto(effort=10_000))
        chosen = []
        for step in range(6):
            engine.step(*batch(step))
            chosen.append(engine.chosen is not None)
        engine.close()
        return chosen

    assert run_threads(2, body)[0] == [False] * 4 + [True] * 2


def test_one_rank_has_nothing_to_choose() -> None:
    engine = run_threads(1, lambda world: _engine(world, "auto"))[0]
    assert engine.chosen is None
    assert engine.program.name == "1f1b"
    assert run_threads(2, lambda world: _engine(world, "auto").program.name) == ["zb_h1"] * 2


def test_measures_anew_after_parameters_were_frozen() -> None:
    def body(world: Group) -> list[bool]:
        engine = _engine(world, Auto(steps=2, effort=10_000))
        chosen = []
        for step in range(6):
            if step == 2:
                for unit in engine.modules.values():
                    for name, param in unit.named_parameters():
                        param.requires_grad_("norm" not in name)
                engine.refresh()
            engine.step(*batch(step))
            chosen.append(engine.chosen is not None)
        engine.close()
        return chosen

    # One step is not measured, two are; the third one's begin finds another program, and it starts again.
    assert run_threads(2, body) == [[False] * 5 + [True]] * 2


@pytest.mark.parametrize("wrong", [{"memory": 0.0}, {"warmup": -1}, {"steps": 0}])
def test_bad_values(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Auto(**wrong)  # type: ignore[arg-type]
