"""Stages by what their units compute: counted on fake tensors, or scaled to a measured run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from triloom.config import load
from triloom.dealing import deal, timed
from triloom.errors import ConfigError
from triloom.foreseen import run_of
from triloom.measured import Figures, Measures, measurement
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.balance import UnitCost
from triloom.plan import Plan, make_plan
from triloom.schedules import one_f_one_b, zb_h1
from triloom.simulate import Costs, simulate
from triloom.trace import Step, Trace, save
from triloom.tracing import count_units

SMALL = "--model.hidden 32 --model.heads 2 --model.seq 16 --train.batch 4"


def plan(words: str, world: int = 2, layers: int = 4) -> Plan:
    """All ranks in one pipeline."""
    loaded = load(f"{SMALL} --model.layers {layers} --parallel.pp {world} {words}".split())
    return make_plan(loaded.config, world, data_vocab=256, sources=loaded.sources)


def test_counted_operations_are_those_of_the_formulas() -> None:
    """A token takes 2 FLOP a weight and pass; attention's two products 4 s h each way, 2.5 times that backwards."""
    p = plan("--model.shape gpt2 --model.vocab 500")
    embed, block, *_, loss = count_units(run_of(p, AdamW()))
    tokens, h, s = 16, 32, 16  # of a microbatch of one sample
    weights, scores = 12 * h * h, 4 * s * h
    assert embed.flops == embed.weight_flops == 0
    assert block.flops == tokens * (2 * weights + scores)
    assert block.weight_flops == tokens * 2 * weights
    assert block.input_flops == tokens * (2 * weights + 2.5 * scores)
    assert loss.flops == loss.input_flops == loss.weight_flops == tokens * 2 * h * 500


def test_a_large_head_gets_a_stage_with_fewer_blocks() -> None:
    even, counted = (deal(plan(f"--model.vocab 4000 {w}"), AdamW()) for w in ("", "--schedule.balance counted"))
    assert even.config.schedule.stages is None
    assert counted.config.schedule.stages == (5, 1)
    again = make_plan(counted.config, 2, data_vocab=256)  # the resolved configuration says the same
    assert deal(again, AdamW()).config == counted.config


def measured_run(folder: Path, head_ms: int) -> None:
    """A run of 1f1b on two stages of three units, in which the second stage took so long."""
    order = zb_h1(2, 4)
    mesh = make_mesh(2, pp=2)
    run = measurement(order, [range(3), range(3, 6)], mesh)
    ms = [1, head_ms]
    timeline = simulate(order, Costs(F=ms, B=ms, W=ms))
    times = np.zeros((2, run.most, 4), dtype=np.int64)
    for r, row in enumerate(timeline.ranks):
        for k, span in enumerate(row):
            times[r, k, :2] = int(span.begin * 1e6), int(span.end * 1e6)
    save(Trace(run, (Step(0, times, Figures(1.0, 0, 0, 0, 0, 0)),), str(mesh), (0.0, 0.0)), folder)


def test_measured_times_move_units_away_from_a_slow_stage(tmp_path: Path) -> None:
    measured_run(tmp_path, head_ms=4)
    found = deal(plan(f"--schedule.balance measured --schedule.measured {tmp_path}"), AdamW())
    assert found.config.schedule.stages is not None
    first, second = found.config.schedule.stages
    assert first > second
    assert found.config.schedule.measured is None


def test_a_measured_run_of_another_model_is_refused(tmp_path: Path) -> None:
    measured_run(tmp_path, head_ms=1)
    with pytest.raises(ConfigError, match="that run had 6 units and this one has 8"):
        deal(plan(f"--schedule.balance measured --schedule.measured {tmp_path}", layers=6), AdamW())


def test_an_automatic_schedule_of_a_measured_run(tmp_path: Path) -> None:
    measured_run(tmp_path, head_ms=2)
    words = f"--schedule.kind auto --schedule.measured {tmp_path} --schedule.microbatches 4"
    found = plan(words)
    assert found.order.microbatches == 4
    assert found.schedule(2, 4) is found.order
    costs = Costs(F=[1, 2], B=[1, 2], W=[1, 2])
    assert simulate(found.order, costs).makespan <= simulate(one_f_one_b(2, 4), costs).makespan
    with pytest.raises(ConfigError, match="that run had pp = 2, this one has 4"):
        plan(words, 4)


def test_times_are_shared_by_what_is_counted() -> None:
    units = [UnitCost(F=0, B=0, W=0), UnitCost(F=1, B=2, W=1), UnitCost(F=3, B=2, W=3), UnitCost(F=1, B=1, W=1)]
    typical = Measures({"F": (4.0, 5.0), "B": (6.0, 0.0), "W": (2.0, 0.0), "BW": (0.0, 8.0)}, 0.0)
    a, b, c, d = timed(units, [(0, 1, 2), (3,)], typical)
    assert (a.F, a.B, a.W) == (0, 0, 0)
    assert (b.F, b.B, b.W) == (1, 3, 0.5)
    assert (c.F, c.B, c.W) == (3, 3, 1.5)
    assert (d.F, d.B, d.W) == (5, 4, 4)
    (alone,) = timed([UnitCost(F=0, B=0, W=0)], [(0,)], typical)
    assert (alone.F, alone.B + alone.W) == (4, 8)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--schedule.memory 3", "memory limits the search of kind = auto"),
        ("--schedule.measured here", "measured times are for kind = auto or balance = measured"),
        ("--schedule.balance measured", "give the run that was measured"),
        ("--schedule.stages 3,3 --schedule.balance counted", "leave one of the two out"),
        ("--schedule.stages 3,2", "the schedule has 2 stages and the model 6 units"),
        ("--schedule.kind auto --schedule.memory 0", "above 0"),
    ],
)
def test_refusals(words: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(words)
