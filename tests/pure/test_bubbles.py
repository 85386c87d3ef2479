"""Recomputation in idle time: shorter by the simulator, no more memory than allowed, the same bits."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_cases import batch, blocks
from triloom import schedules
from triloom.actions import Program, replace_ranks
from triloom.engine import Engine
from triloom.errors import ProgramError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.passes import StateLayout, add_communication, add_recompute
from triloom.passes.bubbles import early_recompute, in_bubbles
from triloom.passes.lowering import lower
from triloom.placement import zero1, zero3
from triloom.schedules import Schedule
from triloom.simulate import Costs, simulate
from triloom.verify import verify

TRAINING = sorted(set(schedules.NAMED) - {"forward"})
MODEL = Costs(held=17.0, kept=1.0, comm=0.3)


def layout_of(program: Program, units: int) -> StateLayout:
    """So many units a stage."""
    every = tuple(tuple(range(s * units, (s + 1) * units)) for s in range(len(program.stages)))
    return StateLayout(every, ())


def beside(program: Program, layout: StateLayout) -> Program:
    """Each R in turn with its backward, unit by unit."""
    return replace_ranks(program, (lower(row, layout, lambda i, a: a.op == "R") for row in program.ranks))


def bytes_held(program: Program, layout: StateLayout) -> list[float]:
    """Peak of every rank by the sizes of MODEL, counted unit by unit."""
    stage_of = {u: s for s, units in enumerate(layout.units) for u in units}
    peaks = []
    for row in program.ranks:
        level = top = 0.0
        for a in row:
            stage = a.subject.index if a.subject.kind == "stage" else stage_of.get(a.subject.index)
            share = 1 / program.stages.count(program.stages[stage]) if a.op in "F R BW B W" else 0.0
            if a.subject.kind == "unit":
                share /= len(layout.units[stage])
            level += share * {"F": 1.0, "R": 16.0, "BW": -17.0, "B": 0.0, "W": -17.0}.get(a.op, 0.0)
            top = max(top, level)
        peaks.append(top)
    return peaks


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(TRAINING),
    st.integers(1, 5),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from((None, 12.0, 25.0, 1e9)),
)
def test_never_later_never_over_the_limit_and_always_proven(
    name: str, p: int, m: int, units: int, memory: float | None
) -> None:
    program = add_communication(add_recompute(schedules.NAMED[name](p, m)))
    layout = layout_of(program, units)
    first, moved = beside(program, layout), early_recompute(program, layout, MODEL, memory)
    before, after = (simulate(x, MODEL, layout=layout) for x in (first, moved))
    assert after.makespan <= before.makespan * (1 + 1e-9)
    for was, now in zip(bytes_held(first, layout), bytes_held(moved, layout), strict=True):
        assert now <= max(was, memory or 0.0) + 1e-6
    for was, now in zip(first.ranks, moved.ranks, strict=True):
        assert sorted(map(str, was)) == sorted(map(str, now))
        assert [a for a in was if a.op != "R"] == [a for a in now if a.op != "R"]
    verify(moved, layout=layout)


def test_ranks_that_wait_recompute_meanwhile() -> None:
    """1F1B, 4 ranks of 4 units, 8 microbatches. Beside its backward an R holds up the gradient, in a bubble it does
    not: with room for everything the step takes as long as with an R of whole stages, which runs while a rank waits."""
    program = add_communication(add_recompute(schedules.one_f_one_b(4, 8)))
    layout = layout_of(program, 4)
    first = beside(program, layout)
    spans = [simulate(early_recompute(program, layout, MODEL, memory), MODEL, layout=layout).makespan
             for memory in (None, 30.0, 1e9)]  # fmt: skip
    worst, whole = simulate(first, MODEL, layout=layout).makespan, simulate(program, MODEL).makespan
    assert worst + 1e-6 >= spans[0] >= spans[1] >= spans[2]
    assert worst > spans[2] + 0.5
    assert spans[2] == pytest.approx(whole, rel=0.02)


def test_units_are_refused() -> None:
    program = add_communication(add_recompute(schedules.one_f_one_b(2, 1)))
    layout = layout_of(program, 2)
    with pytest.raises(ProgramError, match="takes computes of stages"):
        early_recompute(beside(program, layout), layout)


def train(
    group: Group, schedule: str | Schedule, activations: str, stages: tuple[int, ...] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    row = zero3() if group.size == 2 else zero1()
    engine = Engine(
        blocks(7), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=group.size), microbatches=6,
        optimizer=AdamW(lr=0.05), schedule=schedule, stages=stages, placement=row.with_(activations=activations),
    )  # fmt: skip
    if activations == "recompute" and not isinstance(schedule, str):
        rows = [[a.op for a in row] for row in engine.program.ranks]
        assert any(("R", "R") in pairwise(op for op in row if op in ("R", "BW", "B")) for row in rows)
    return [engine.step(*batch(i)).loss for i in range(3)], engine.full_state()


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zb_h1", "gpipe"])
def test_the_same_bits_wherever_r_is(name: str) -> None:
    ranks = 2 if name == "gpipe" else 3
    want = run_threads(ranks, partial(train, schedule=name, activations="keep"))[0]
    counts = (2, 1, 1, 1, 1, 2) if name == "interleaved" else {2: (4, 4), 3: (3, 3, 2)}[ranks]
    early = in_bubbles(name, counts, MODEL, memory=1e9)
    for schedule in (name, early):
        losses, state = run_threads(ranks, partial(train, schedule=schedule, activations="recompute", stages=counts))[0]
        assert losses == want[0]
        assert all(torch.equal(state[k], v) for k, v in want[1].items())
