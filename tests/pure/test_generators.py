"""Generators of the papers: their shape, closed forms and published figures, over every size."""

from __future__ import annotations

import itertools
from functools import partial

import pytest

from triloom.actions import Program, compute
from triloom.errors import ConfigError
from triloom.passes import add_communication
from triloom.schedules import (
    NAMED,
    Schedule,
    breadth_first,
    dualpipe_v,
    forward_only,
    forwards,
    gpipe,
    interleaved,
    one_f_one_b,
    v_half,
    v_min,
    zb_h1,
    zb_h2,
    zb_v,
)
from triloom.schedules.base import write
from triloom.simulate import Costs, simulate
from triloom.simulate.memory import peaks
from triloom.verify import verify

SOME_RANKS = (1, 2, 3, 4, 6, 9, 16)
RANKS, MICROBATCHES = range(1, 17), range(1, 65)
FEW = sorted({*range(1, 18), 23, 24, 31, 32, 33, 48, 63, 64})
"""Of the microbatch counts, those around the numbers of ranks and their multiples."""

PUBLISHED = {
    24: ((18.522, 18.086, 9.337, 0.601), {"1f1b": 0.2431, "zb_h1": 0.1585, "zb_h2": 0.1083}),
    32: ((18.513, 18.086, 9.331, 0.626), {"1f1b": 0.1985, "zb_h1": 0.1242, "zb_h2": 0.0837}),
    64: ((18.546, 18.097, 9.321, 0.762), {"1f1b": 0.1240, "zb_h1": 0.0674, "zb_h2": 0.0444}),
}
"""arXiv 2401.10241, tables 9 and 5, 1.5B model on 8 ranks: milliseconds of F, B, W and a hop, and bubble rates."""


@pytest.mark.parametrize("m", PUBLISHED)
def test_published_bubble_rates(m: int) -> None:
    (f, b, w, comm), want = PUBLISHED[m]
    got = {name: simulate(NAMED[name](8, m), Costs(F=f, B=b, W=w, comm=comm)).bubble_span for name in want}
    assert {name: round(x, 4) for name, x in got.items()} == want


@pytest.mark.parametrize("make", [gpipe, one_f_one_b])
def test_bubble_of_one_stage_a_rank(make: Schedule) -> None:
    for p, m in itertools.product(RANKS, MICROBATCHES):
        assert simulate(make(p, m)).bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-12), (p, m)


@pytest.mark.parametrize(("make", "v"), [(interleaved, 2), (interleaved, 3), (breadth_first, 2)])
def test_bubble_of_several_stages_a_rank(make: Schedule, v: int) -> None:
    """(p-1)/(v m + p-1) from m = p on; below, the loop is not full and a microbatch's way round counts."""
    every = (make, v) == (interleaved, 2)
    for p, m in itertools.product(RANKS if every else SOME_RANKS, MICROBATCHES if every else FEW):
        timeline = simulate(partial(make, v=v)(p, m), Costs(F=1.0, BW=2.0))
        steps = v * m + p - 1 if m >= p else v * p + m - 1
        assert timeline.makespan == pytest.approx(3 * steps / v), (p, m)
        assert timeline.bubble == pytest.approx(1 - v * m / steps, abs=1e-12), (p, m)


def test_memory_of_1f1b_and_zb_h1() -> None:
    for p, m in itertools.product(RANKS, FEW):
        assert peaks(one_f_one_b(p, m), Costs()) == tuple(float(min(p - r, m)) for r in range(p))
        delayed = zb_h1(p, m)
        for deferred in (0.0, 0.4, 1.0):
            assert max(peaks(delayed, Costs(deferred=deferred))) == min(p, m)
        assert max(peaks(zb_h2(p, m), Costs())) == min(2 * p - 1, m)


def test_zb_h1_saves_the_weight_gradients_twice() -> None:
    """(p-1)(F+B-W) against 1F1B's (p-1)(F+B+W) (arXiv 2401.10241, table 2): a third at equal costs."""
    for p, m, (f, b, w) in itertools.product(SOME_RANKS, (16, 17, 40), ((1, 1, 1), (3, 3, 2), (2, 3, 2))):
        timeline = simulate(zb_h1(p, m), Costs(F=f, B=b, W=w))
        assert timeline.makespan == pytest.approx(m * (f + b + w) + (p - 1) * (f + b - w)), (p, m)


def test_zb_h2_has_no_gap_on_any_rank() -> None:
    for p in SOME_RANKS:
        for m in (2 * p - 1, 2 * p, 3 * p + 1, 64):
            assert simulate(zb_h2(p, m)).bubble_span == pytest.approx(0.0, abs=1e-12), (p, m)


def test_zb_v_has_no_gap_at_the_memory_of_1f1b() -> None:
    for p, m in itertools.product(SOME_RANKS, FEW):
        timeline = simulate(zb_v(p, m))
        assert max(timeline.peak) <= min(p, m)
        if m >= 2 * p - 1:
            assert timeline.bubble_span == pytest.approx(0.0, abs=1e-12), (p, m)
            assert timeline.makespan == pytest.approx(3 * m + (p - 1) / 2), (p, m)


def test_memory_and_bubble_of_its_relatives() -> None:
    for p, m in itertools.product(SOME_RANKS, (1, 5, 16, 33, 64)):
        chain = simulate(one_f_one_b(p, m))
        half, third, dual = (simulate(make(p, m)) for make in (v_half, v_min, dualpipe_v))
        assert max(half.peak) <= min(m, (p + 3) / 2)
        assert max(third.peak) <= min(m, (p + 4) / 3)
        assert max(dual.peak) <= min(m, p + 0.5)
        if m >= 2 * p:
            assert half.bubble <= 0.71 * chain.bubble
            assert third.bubble <= 0.81 * chain.bubble
            assert dual.makespan == pytest.approx(3 * m + (p - 1) / 2), (p, m)


DRAWN = {
    "zb_h1": (
        zb_h1, 4, 6, 1,
        "F1.0 F1.1 F1.2 B1.0 F1.3 B1.1 W1.0 F1.4 B1.2 W1.1 F1.5 B1.3 W1.2 B1.4 W1.3 B1.5 W1.4 W1.5",
    ),
    "zb_h2": (
        zb_h2, 3, 6, 1,
        "F1.0 F1.1 F1.2 B1.0 F1.3 B1.1 F1.4 B1.2 W1.0 F1.5 B1.3 W1.1 B1.4 W1.2 B1.5 W1.3 W1.4 W1.5",
    ),
    "zb_v": (
        zb_v, 2, 3, 1,
        "F1.0 F2.0 F1.1 F2.1 B2.0 W2.0 F1.2 B1.0 W1.0 F2.2 B2.1 W2.1 B1.1 B2.2 B1.2 W1.1 W2.2 W1.2",
    ),
    "dualpipe_v": (
        dualpipe_v, 2, 4, 1,
        "F1.0 F2.0 F1.1 F2.1 F1.2 BW2.0 F2.2 BW1.0 F1.3 BW2.1 F2.3 BW1.1 BW2.2 BW1.2 B2.3 B1.3 W2.3 W1.3",
    ),
    "interleaved": (
        interleaved, 2, 4, 1,
        "F1.0 F1.1 F3.0 BW3.0 F3.1 BW3.1 F1.2 BW1.0 F1.3 BW1.1 F3.2 BW3.2 F3.3 BW3.3 BW1.2 BW1.3",
    ),
}  # fmt: skip
"""Ranks, microbatches, a rank, and its row: operation, stage, microbatch."""


@pytest.mark.parametrize("name", DRAWN)
def test_rows_as_drawn(name: str) -> None:
    make, p, m, rank, row = DRAWN[name]
    assert " ".join(f"{a.op}{a.subject.index}.{a.microbatch}" for a in make(p, m).ranks[rank]) == row


@pytest.mark.parametrize("make", [interleaved, breadth_first])
def test_more_stages_a_rank_are_proven(make: Schedule) -> None:
    for p, m, v in itertools.product((1, 2, 3, 5), (1, 2, 4, 5, 9, 11), (1, 3, 4)):
        program = add_communication(partial(make, v=v)(p, m))
        for lanes in ("independent", "per_direction"):
            verify(program, lanes=lanes)
        assert program.stages == tuple(range(p)) * v


def test_one_stage_a_rank_is_1f1b() -> None:
    """With v = 1 the loop is a chain; forwards run further ahead, a backward as soon as it can."""
    for p, m in itertools.product((1, 3, 4), (4, 9)):
        assert simulate(interleaved(p, m, 1)).makespan == simulate(one_f_one_b(p, m)).makespan


@pytest.mark.parametrize("name", NAMED)
def test_forwards_of_a_program_are_its_evaluation(name: str) -> None:
    for p, m in itertools.product((1, 2, 4), (1, 3, 8)):
        evaluation = forwards(NAMED[name](p, m))
        verify(add_communication(evaluation))
        if evaluation.stages == tuple(range(p)):
            assert evaluation == forward_only(p, m)


def test_the_notation_numbers_microbatches_and_settles_weights() -> None:
    row = write((0, 3), 2, ("F0", 3), ("F1 B1", 2), ("W B0", 1), ("BW0 W0", 1))
    assert " ".join(f"{a.op}{a.subject.index}.{a.microbatch}" for a in row) == (
        "F0.0 F0.1 F3.0 B3.0 F3.1 B3.1 W3.0 B0.0 BW0.1 W0.0 W3.1"
    )
    assert write((5,), 1, ("W F B", 1)) == (compute("F", 5, 0), compute("B", 5, 0), compute("W", 5, 0))


@pytest.mark.parametrize("make", [interleaved, breadth_first])
@pytest.mark.parametrize("v", [0, -1, 1.5, True])
def test_stages_a_rank_must_be_a_positive_integer(make: Schedule, v: int) -> None:
    with pytest.raises(ConfigError, match=r"needs v to be a positive integer"):
        partial(make, v=v)(2, 2)


def test_programs_are_plain_data() -> None:
    for name, make in NAMED.items():
        program = make(3, 4)
        assert isinstance(program, Program) and program.name == name and len(program.ranks) == 3
        assert make(3, 4) == program
