"""Schedules have the shape of their papers, and all of them are proven."""

import itertools

import pytest

from triloom import schedules
from triloom.actions import compute
from triloom.errors import ConfigError
from triloom.passes import add_communication
from triloom.verify import verify

SIZES = list(itertools.product(range(1, 9), range(1, 13)))


@pytest.mark.parametrize("name", schedules.NAMED)
def test_every_size_is_proven(name):
    for p, m in SIZES:
        program = add_communication(schedules.NAMED[name](p, m))
        for lanes in ("independent", "per_direction"):
            verdict = verify(program, lanes=lanes)
            assert len(verdict.order) == sum(map(len, program.ranks))


def test_one_f_one_b_holds_at_most_the_depth_below_it():
    for p, m in SIZES:
        want = tuple(min(p - rank, m) for rank in range(p))
        assert verify(add_communication(schedules.one_f_one_b(p, m))).in_flight == want


def test_gpipe_holds_every_microbatch():
    for p, m in SIZES:
        assert verify(add_communication(schedules.gpipe(p, m))).in_flight == (m,) * p


def test_forward_only_holds_nothing():
    assert verify(add_communication(schedules.forward_only(3, 4))).in_flight == (0, 0, 0)


def test_one_f_one_b_as_drawn_in_the_paper():
    """arXiv 2104.04473, figure 4 top: 4 devices, 8 microbatches, device 3 of 4 (stage 2)."""
    drawn = "F0 F1 B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 F7 B6 B7"
    row = [compute({"F": "F", "B": "BW"}[cell[0]], 2, int(cell[1])) for cell in drawn.split()]
    assert schedules.one_f_one_b(4, 8).ranks[2] == tuple(row)


def _seconds(program, backward=2):
    """Length of a program with F = 1, BW = ``backward`` and free transfers: the event-by-event replay."""
    end, clock = {}, [0] * len(program.ranks)
    left = [list(row) for row in program.ranks]
    while any(left):
        for rank, row in enumerate(left):
            while row:
                a = row[0]
                s, m = a.subject.index, a.microbatch
                needs = [("F", s - 1, m)] if a.op == "F" else [("F", s, m), ("BW", s + 1, m)]
                needs = [n for n in needs if 0 <= n[1] < len(program.stages)]
                if any(n not in end for n in needs):
                    break
                start = max([clock[rank], *(end[n] for n in needs)])
                clock[rank] = end[a.op, s, m] = start + (1 if a.op == "F" else backward)
                row.pop(0)
    return max(clock)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_is_the_closed_form(name):
    """(p-1)/(m+p-1) of the step, for any ratio of backward to forward."""
    for p, m in SIZES:
        for backward in (1, 2, 3):
            assert _seconds(schedules.NAMED[name](p, m), backward) == (m + p - 1) * (1 + backward), (p, m)


@pytest.mark.parametrize("name", schedules.NAMED)
@pytest.mark.parametrize("sizes", [(0, 1), (1, 0), (-1, 2), (2, True), (1.0, 1)])
def test_sizes_must_be_positive_integers(name, sizes):
    with pytest.raises(ConfigError, match=f"'{name}'.*positive integer"):
        schedules.NAMED[name](*sizes)
