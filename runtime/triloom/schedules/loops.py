"""Looped schedules: several stages a rank, dealt in rounds, fused backwards. Pure."""

from __future__ import annotations

from itertools import accumulate

from ..actions import Action, Program
from ..shards import split_even
from .base import check_sizes, chunks_of, looped, write


def breadth_first(ranks: int, microbatches: int, v: int = 2) -> Program:
    """All microbatches through a stage before the next one (Lamy-Poirier, arXiv 2211.05953, figure 4d).

    GPipe on a loop: bubble (p-1)/(v m + p-1) for m >= p, every microbatch is in flight. Each stage's
    gradients are final at once, so their reduction overlaps with the stages that follow.
    """
    check_sizes("looped_bfs", ranks, microbatches, v=v)
    where, m = looped(ranks, v), microbatches
    there = [(f"F{c}", m) for c in range(v)]
    back = [(f"BW{c}", m) for c in reversed(range(v))]
    rows = tuple(write(chunks_of(where, r), m, *there, *back) for r in range(ranks))
    return Program(rows, where, m, "looped_bfs")


def interleaved(ranks: int, microbatches: int, v: int = 2) -> Program:
    """1F1B over ``v`` stages a rank (Narayanan et al., arXiv 2104.04473, figure 4 bottom).

    Microbatches go round the loop in groups, a stage after the other. Groups are of p microbatches in
    the paper, which must divide m; here of p or more, as even as can be, so that any m will do: a
    smaller group would not be back when its next round is due. Before its first backward a rank runs
    the group's forwards up to the last stage, and two more for each rank below it: one forward and one
    backward travel to the end and back. Bubble (p-1)/(v m + p-1) for m >= p.
    """
    check_sizes("interleaved", ranks, microbatches, v=v)
    where = looped(ranks, v)
    groups = [b - a for a, b in split_even(microbatches, max(1, microbatches // ranks))]
    there = [c for size in groups for c in range(v) for _ in range(size)]
    back = [v - 1 - c for c in there]
    leads = _leads(groups, v)

    def row(rank: int) -> tuple[Action, ...]:
        below, done = ranks - 1 - rank, 0
        order: list[str] = []
        for k, chunk in enumerate(back):
            upto = min(max(done + 1, leads[k] + 2 * below), len(there))
            order += [f"F{c}" for c in there[done:upto]] + [f"BW{chunk}"]
            done = max(done, upto)
        return write(chunks_of(where, rank), microbatches, (" ".join(order), 1))

    return Program(tuple(map(row, range(ranks))), where, microbatches, "interleaved")


def _leads(groups: list[int], v: int) -> list[int]:
    """For each backward of a rank, the forwards up to and with its own."""
    starts = [0, *accumulate(v * size for size in groups)]
    return [
        start + (v - 1 - c) * size + k + 1
        for start, size in zip(starts, groups, strict=False)
        for c in range(v)
        for k in range(size)
    ]
