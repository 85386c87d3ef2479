"""The engine on programs from files, on pytrees and shapes that vary, and on skip connections."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stage_cases import MODELS, PAIRS, WIDTH, Only, batch, blocks, joined, trained, with_joins
from triloom import schedules
from triloom.actions import Program, parse_program
from triloom.engine import Engine
from triloom.errors import ConfigError, TriloomError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.microbatches import Microbatches
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.parallel.skips import with_skips
from triloom.passes import add_communication
from triloom.placement import Placement, zero0, zero3
from triloom.verify import verify


def evaluated(group: Group, order: Program | None, placement: Placement) -> tuple[list[float], str]:
    engine = Engine(
        blocks(7), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=2), microbatches=3,
        optimizer=AdamW(lr=0.05), placement=placement, schedule="interleaved" if order is None else lambda p, m: order,
    )  # fmt: skip
    losses = [engine.evaluate(*batch(9)).loss, engine.step(*batch(0)).loss, engine.evaluate(*batch(9)).loss]
    return losses, engine.program.to_csv()


@pytest.mark.parametrize("placement", [zero0(), zero3()], ids=["zero0", "zero3"])
def test_a_complete_program_of_units_from_a_file_trains_and_evaluates(placement: Placement) -> None:
    want, text = run_threads(2, partial(evaluated, order=None, placement=placement))[0]
    assert "F:unit1@0" in text or not placement.params.sharded
    got, again = run_threads(2, partial(evaluated, order=parse_program(text), placement=placement))[0]
    assert got == want and again == text


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_pytrees_between_stages_equal_one_process(name: str) -> None:
    losses, params, _ = trained(Solo(), name, 1)
    for pp in (2, 3):
        for schedule in ("1f1b", "zb_h1") if name == "uneven" else ("1f1b", "interleaved", "zb_h1"):
            got, state, verdict = run_threads(pp, partial(trained, name=name, pp=pp, schedule=schedule))[0]
            assert got == losses
            assert all(torch.equal(state[k], v) for k, v in params.items())
            assert ("bytes of activations unknown" in verdict) == (name == "data")


def test_shapes_that_follow_from_the_data_are_refused_unless_said_so() -> None:
    with pytest.raises(TriloomError, match=r"another shape .* give Engine\(shapes='data'\)"):
        run_threads(2, partial(trained, name="data", pp=2, shapes="batch", stages={2: (3, 4)}))
    with pytest.raises(ConfigError, match="shapes='tokens'"):
        trained(Solo(), "data", 1, shapes="tokens")


def test_what_cannot_travel_is_named() -> None:
    def run(group: Group) -> None:
        class Bad(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return {"x": x, "dtype": torch.float32}

        engine = Engine(
            [nn.Linear(WIDTH, WIDTH), Bad(), Only()], mean_loss(F.mse_loss), world=group, mesh=make_mesh(2, pp=2)
        )
        engine.step(torch.ones(2, WIDTH), torch.ones(2, WIDTH))

    with pytest.raises(ConfigError, match="must be dicts, lists, tuples, tensors and plain values"):
        run_threads(2, run)


def test_a_batch_that_is_cut_already_must_fit() -> None:
    engine = Engine(blocks(1), mean_loss(F.mse_loss), microbatches=2)
    x = torch.ones(2, WIDTH, dtype=torch.float64)
    with pytest.raises(ConfigError, match="2 microbatches a step, the batch is cut into 3"):
        engine.step(Microbatches([x] * 3), Microbatches([x] * 3))
    with pytest.raises(ConfigError, match="must agree on dim 0"):
        engine.step(Microbatches([x, {"a": x, "b": x[:1]}]), Microbatches([x, x]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(schedules.NAMED)), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_receives_that_wait_for_a_header_deadlock_nowhere(name: str, p: int, m: int, early: int) -> None:
    program = add_communication(schedules.NAMED[name](p, m), early)
    for lanes in ("independent", "per_direction"):
        verdict = verify(program, lanes=lanes, headers=True)
        assert verdict.headers and verdict.peak_bytes is None


# ---------------------------------------------------------------- skips


def plain_gradients() -> tuple[float, dict[str, torch.Tensor]]:
    modules, made = joined(), dict[str, torch.Tensor]()
    x, y = batch(0)
    for name, module in ((str(i), m) for i, m in enumerate(modules)):
        x = made[name] = module(x, *(made[s] for s, t in PAIRS if t == name))
    loss = F.mse_loss(x, y)
    loss.backward()
    params = {f"{i}.{n}": p for i, m in enumerate(modules) for n, p in m.named_parameters()}
    return loss.item(), {name: p.grad for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize("pp", [3, 4])
def test_skip_connections_equal_one_process(pp: int) -> None:
    losses, params = with_joins(Solo(), 1, "1f1b")
    for schedule, columns in (
        ("1f1b", {}),
        ("interleaved", {}),
        ("zb_h1", {}),
        ("gpipe", {}),
        ("1f1b", {"activations": "recompute"}),
    ):
        got, state = run_threads(pp, partial(with_joins, pp=pp, schedule=schedule, **columns))[pp - 1]
        assert got == losses
        assert all(torch.equal(state[k], v) for k, v in params.items())


def test_gradients_of_skip_connections_are_those_of_torch() -> None:
    loss, grads = plain_gradients()
    engine = Engine(with_skips(joined(), PAIRS), mean_loss(F.mse_loss), optimizer=AdamW(lr=0.1), clip=None)
    assert engine.step(*batch(0)).loss == pytest.approx(loss, rel=1e-12)
    for name, moment in engine.full_state("exp_avg").items():
        torch.testing.assert_close(moment, 0.1 * grads[name], rtol=1e-10, atol=1e-14)


def test_skips_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="of a unit '9'; the units are 0, 1, 2"):
        with_skips(blocks(3), [("0", "9")])
    with pytest.raises(ConfigError, match="goes backwards"):
        with_skips(blocks(3), [("2", "1")])
