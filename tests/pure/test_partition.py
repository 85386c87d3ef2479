"""Stage layouts: explicit, even, and from costs by simulated makespan."""

from __future__ import annotations

import random
from itertools import combinations
from math import comb

import pytest

from triloom.errors import ConfigError
from triloom.parallel.balance import UnitCost, balance, ranges, smallest_largest_sum, stage_costs
from triloom.parallel.partition import partition
from triloom.schedules import NAMED, interleaved, one_f_one_b, zb_h1
from triloom.simulate import Costs, simulate


def block(scale=1.0, **more):
    return UnitCost(F=scale, B=scale, W=scale, **more)


def model(blocks, head=2.0):
    """An embedding that is cheap, blocks, and a head with the loss."""
    return [UnitCost(F=0.1, B=0.0, W=0.2), *[block()] * blocks, block(head)]


def every_layout(units, stages):
    return [ranges(cuts, units) for cuts in combinations(range(1, units), stages - 1)]


def best_of_all(units, program, costs):
    return min(
        simulate(program, stage_costs(units, stages, costs)).makespan
        for stages in every_layout(len(units), len(program.stages))
    )


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "gpipe"])
@pytest.mark.parametrize(("count", "p", "m"), [(8, 3, 6), (10, 4, 9), (13, 4, 5), (5, 5, 3), (4, 1, 2)])
def test_the_best_of_all_layouts(name, count, p, m):
    """Exhaustive where there are few layouts; by descent (13 units: 220 layouts) as good."""
    draw = random.Random(count)
    costs = Costs(comm=0.1)
    for units in (
        model(count - 2),
        [UnitCost(F=draw.random(), B=draw.random(), W=draw.random()) for _ in range(count)],
    ):
        program = NAMED[name](p, m)
        found = balance(units, program, costs)
        assert found.timeline.makespan == pytest.approx(best_of_all(units, program, costs))
        assert sum(found.sizes) == count and [u for run in found.stages for u in run] == list(range(count))
        assert found.tried <= max(200, comb(count - 1, p - 1))


def test_the_makespan_is_not_the_largest_sum():
    """Few microbatches: a long first stage costs less than a long last one, at the same largest sum."""
    units, program = model(12), one_f_one_b(4, 8)
    found = balance(units, program)
    cuts = smallest_largest_sum([u.F + u.B + u.W for u in units], 4)
    by_sum = simulate(program, stage_costs(units, ranges(cuts, len(units)), Costs()))
    assert found.timeline.makespan < 0.98 * by_sum.makespan


def test_large_transfers_move_the_cut():
    """The wide output of unit 2 should not travel."""
    units = [block(out=1.0), block(out=1.0), block(out=40.0), block(out=1.0), block(out=1.0), block()]
    link = Costs(bandwidth=10.0)
    assert balance(units, one_f_one_b(2, 4), link).sizes != (3, 3)
    assert balance([block(out=1.0)] * 6, one_f_one_b(2, 4), link).sizes == (3, 3)


def test_several_stages_a_rank():
    found = balance(model(14), interleaved(4, 8, 2), Costs(comm=0.05))
    even = simulate(interleaved(4, 8, 2), stage_costs(model(14), partition(16, 8), Costs(comm=0.05)))
    assert len(found.stages) == 8 and found.timeline.makespan < even.makespan


def test_memory_limits_the_layout():
    """1F1B holds most on rank 0: with a limit its stage has to be short, and the step is longer."""
    units, program = [block(held=1.0)] * 12, one_f_one_b(3, 9)
    free = balance(units, program)
    tight = balance(units, program, memory=9.0)
    assert free.sizes == (4, 4, 4) and max(free.timeline.peak) == 12
    assert max(tight.timeline.peak) <= 9 and tight.timeline.makespan > free.timeline.makespan
    with pytest.raises(
        ConfigError, match=r"none of \d+ layouts of 12 units in 3 stages .* memory of 2; the least peak is"
    ):
        balance(units, program, memory=2)


def test_an_explicit_layout_is_kept():
    found = balance(model(6), zb_h1(2, 4), sizes=(5, 3))
    assert found.sizes == (5, 3) and found.tried == 1
    assert found.timeline.makespan == simulate(zb_h1(2, 4), stage_costs(model(6), found.stages, Costs())).makespan


@pytest.mark.parametrize("sizes", [(5, 4), (8,), (0, 8), (2, 3, 3)])
def test_an_explicit_layout_must_add_up(sizes):
    with pytest.raises(ConfigError, match="must be 2 positive counts that sum to 8 units"):
        balance(model(6), zb_h1(2, 4), sizes=sizes)


def test_more_stages_than_units_are_refused():
    with pytest.raises(ConfigError, match="8 pipeline stages need at least 8 units"):
        balance(model(4), interleaved(4, 4, 2))
    assert partition(7, 3) == (range(3), range(3, 5), range(5, 7))
    assert partition(4, 2, (1, 3)) == (range(1), range(1, 4))


def test_smallest_largest_sum_is_the_smallest():
    draw = random.Random(3)
    for count in range(1, 9):
        for parts in range(1, count + 1):
            weights = [draw.choice([0.0, draw.random(), 3.0]) for _ in range(count)]

            def largest(stages, weights=weights):
                return max(sum(weights[u] for u in run) for run in stages)

            want = min(map(largest, every_layout(count, parts)))
            got = ranges(smallest_largest_sum(weights, parts), count)
            assert all(got) and largest(got) == pytest.approx(want)
