"""The automatic schedule: never worse than a named one, within its memory, above its bound, at published figures."""

from __future__ import annotations

import itertools
import random
import time
from contextlib import suppress
from math import inf

import pytest

from triloom.actions import Program, compute
from triloom.errors import ConfigError, ProgramError
from triloom.passes import add_communication
from triloom.schedules import NAMED, gpipe, one_f_one_b
from triloom.search import auto, automatic, lower_bound
from triloom.simulate import Costs, simulate
from triloom.verify import verify

QUICK = 60_000
"""Effort for tests that look at rules, not at how good the result is."""

TRAINING = {name: make for name, make in NAMED.items() if name != "forward"}

PUBLISHED = {
    24: ((18.522, 18.086, 9.337, 0.601), 0.0433),
    32: ((18.513, 18.086, 9.331, 0.626), 0.0039),
    64: ((18.546, 18.097, 9.321, 0.762), 0.0026),
}
"""ZB-2p of arXiv 2401.10241, tables 9 and 5: 1.5B model on 8 ranks at twice 1F1B's memory."""


@pytest.mark.parametrize("m", PUBLISHED)
def test_reaches_the_published_optimum_at_twice_the_memory(m):
    """Held 34 + 5 a s / h and deferred 32 bytes times s b h, as the paper counts: a = 24, s = 1024, h = 2304."""
    (f, b, w, comm), rate = PUBLISHED[m]
    held = 34 + 5 * 24 * 1024 / 2304
    costs = Costs(F=[f] * 8, B=b, W=w, comm=comm, held=held, deferred=32.0)  # a list: one stage a rank
    limit = 2 * max(simulate(one_f_one_b(8, m), costs).peak)
    found = auto(8, m, costs, memory=limit)
    assert found.program.stages == tuple(range(8))
    assert found.timeline.bubble_span <= rate + 0.005
    assert max(found.timeline.peak) <= limit
    assert found.gap < 1e-4
    verify(add_communication(found.program), lanes="per_direction")


def random_costs(draw, p, chain):
    def times():
        return [draw.uniform(0.5, 2.0) for _ in range(p)] if chain else draw.uniform(0.5, 2.0)

    return Costs(
        F=times(), B=times(), W=times(), comm=draw.choice([0.0, draw.uniform(0.0, 0.5)]),
        deferred=draw.choice([0.0, 0.4, 1.0]),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_never_worse_than_a_named_schedule_that_fits(seed):
    draw = random.Random(seed)
    p, m, chain = draw.randrange(1, 6), draw.randrange(1, 13), seed % 2 == 0
    costs = random_costs(draw, p, chain)
    limit = draw.choice([inf, p * draw.uniform(0.7, 2.5)])
    timelines = {n: simulate(make(p, m), costs) for n, make in TRAINING.items() if costs.fits(make(p, m).stages)}
    fitting = {n: t.makespan for n, t in timelines.items() if max(t.peak) <= limit}
    if not fitting and limit < 1:
        return
    found = auto(p, m, costs, memory=limit, effort=QUICK)
    assert max(found.timeline.peak) <= limit * (1 + 1e-9)
    assert found.timeline.makespan <= min(fitting.values(), default=inf) * (1 + 1e-9)
    assert (found.best_named in fitting) if fitting else found.best_named is None
    assert found.timeline.makespan >= found.bound * (1 - 1e-9)
    assert simulate(found.program, costs).makespan == found.timeline.makespan
    for lanes in ("independent", "per_direction"):
        verify(add_communication(found.program), lanes=lanes)


def every_row(stage, m):
    """All orders of a stage's F, B and W in which each operation runs in microbatch order."""

    def extend(row, f, b, w):
        if w == m:
            yield tuple(row)
        for op, count, most in (("F", f, m), ("B", b, f), ("W", w, b)):
            if count < most:
                done = (f + (op == "F"), b + (op == "B"), w + (op == "W"))
                yield from extend([*row, compute(op, stage, count)], *done)

    return list(extend([], 0, 0, 0))


def every_program(m):
    """Of two stages on two ranks, those that can run to their end."""
    for pair in itertools.product(*(every_row(stage, m) for stage in range(2))):
        with suppress(ProgramError):
            simulate(program := Program(pair, (0, 1), m))
            yield program


@pytest.fixture(scope="module")
def small_programs():
    """With three microbatches: 42 x 42 pairs of rows."""
    return list(every_program(3))


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_where_all_programs_can_be_tried(seed, small_programs):
    costs = random_costs(random.Random(100 + seed), 2, True)
    timelines = [simulate(program, costs) for program in small_programs]
    for limit in (1.4, 2.0, 3.0):
        best = min(t.makespan for t in timelines if max(t.peak) <= limit)
        assert lower_bound((0, 1), 3, costs, (limit, limit)) <= best * (1 + 1e-9)
        found = auto(2, 3, costs, memory=limit, effort=QUICK)
        assert found.timeline.makespan == pytest.approx(best)


def test_the_bound_holds_for_every_named_program():
    draw = random.Random(5)
    for _ in range(30):
        p, m = draw.randrange(1, 7), draw.randrange(1, 15)
        costs = random_costs(draw, p, chain=False)
        for make in TRAINING.values():
            timeline = simulate(make(p, m), costs)
            bound = lower_bound(timeline.program.stages, m, costs, timeline.peak)
            assert bound <= timeline.makespan * (1 + 1e-9), timeline.program.name
            assert bound >= timeline.ideal * (1 - 1e-9)


def test_the_bound_is_tight_where_the_optimum_is_known():
    """1F1B without comm at its own memory when W cannot be split; a single rank; a single microbatch."""
    fused = simulate(one_f_one_b(4, 8)).makespan
    assert lower_bound((0, 1, 2, 3), 8, Costs(), (8.0,) * 4, split=False) == pytest.approx(fused)
    assert lower_bound((0,), 5, Costs(), (inf,)) == 15
    assert lower_bound((0, 1, 2), 1, Costs(comm=0.5), (inf,) * 3) == 3 + 3 + 4 * 0.5 + 1


def test_without_split_no_w_stands_alone():
    found = auto(4, 8, Costs(F=[1, 2, 1, 1], BW=[2, 4, 2, 2]), split=False, memory=6, effort=QUICK)
    assert {a.op for row in found.program.ranks for a in row} == {"F", "BW"}
    assert found.timeline.makespan <= simulate(one_f_one_b(4, 8), Costs(F=[1, 2, 1, 1], BW=[2, 4, 2, 2])).makespan


def test_unequal_stages_gain_over_every_named_schedule():
    """A heavy last stage (the loss) with latency: what a hand-drawn schedule for equal stages cannot know."""
    costs = Costs(F=[1, 1, 1, 1.6], B=[1, 1, 1, 1.4], W=[1, 1, 1, 1.2], comm=0.3, deferred=0.5)
    found = auto(4, 12, costs, memory=6, effort=4 * QUICK)
    best = min(
        t.makespan for make in (one_f_one_b, NAMED["zb_h1"], gpipe)
        if max((t := simulate(make(4, 12), costs)).peak) <= 6
    )  # fmt: skip
    assert found.timeline.makespan < best
    assert found.gap < 0.02


def test_limits_may_differ_by_rank():
    limit = (4.0, 2.0, 3.0)
    found = auto(3, 6, Costs(comm=0.1), memory=limit, effort=QUICK)
    assert all(peak <= most for peak, most in zip(found.timeline.peak, limit, strict=True))


def test_the_same_arguments_give_the_same_program():
    costs = Costs(F=[1, 2, 1], B=[1, 1, 2], W=[1, 1, 1], comm=0.2)
    one, two = (auto(3, 7, costs, memory=4, effort=QUICK) for _ in range(2))
    assert one.program == two.program
    quick = automatic(costs, memory=4, effort=QUICK)
    assert quick(3, 7) == one.program


@pytest.mark.parametrize("memory", [0.2, (1.0, 0.01)])
def test_a_memory_nothing_fits_is_an_error(memory):
    with pytest.raises(ConfigError, match=r"no schedule of 4 microbatches on 2 ranks fits"):
        auto(2, 4, Costs(), memory=memory, effort=QUICK)


@pytest.mark.parametrize("memory", [0, -1.0, (1.0, 2.0, 3.0), float("nan")])
def test_a_limit_must_be_positive_and_fit_the_ranks(memory):
    with pytest.raises(ConfigError, match=r"one positive number, or one for each of 2 ranks"):
        auto(2, 4, Costs(), memory=memory)


def test_sixteen_ranks_and_64_microbatches_take_seconds():
    begin = time.process_time()
    found = auto(16, 64, Costs(F=1.0, B=1.1, W=0.8, comm=0.05, deferred=0.5), memory=16.0)
    assert time.process_time() - begin < 5.0
    assert found.gap < 0.05
    assert found.timeline.makespan <= simulate(NAMED["zb_v"](16, 64), Costs(F=1.0, B=1.1, W=0.8, comm=0.05)).makespan
