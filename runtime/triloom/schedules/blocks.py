"""Schedules made by repeating a building block: V-Half and V-Min. Pure.

Qi et al., Pipeline Parallelism with Controllable Memory, arXiv 2405.15362. A *block* says when one
microbatch runs on each rank, in units of the F, B or W of one stage. Two stages a rank make six
actions a microbatch, so the block of the next microbatch begins six units later; it fits if no two
actions of a rank fall on the same unit modulo six. How long a microbatch's activations live in its
block, divided by six, is how many of them a rank holds: the speed at which F and B travel over the
ranks sets the memory.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ..actions import Action, Program, compute
from .base import check_sizes, chunks_of, v_shaped

PERIOD = 6
ACTIONS = (("F", 0), ("F", 1), ("B", 1), ("B", 0), ("W", 1), ("W", 0))
"""Operation and chunk of a rank's six actions, as in a row of a block."""


class Steps(NamedTuple):
    """Units from a rank to the next for F down the V and up, then for B down and up."""

    f0: int
    f1: int
    b1: int
    b0: int


def v_min(ranks: int, microbatches: int) -> Program:
    """A third of 1F1B's memory: everything travels as fast as it can.

    The two halves of a microbatch live 4(p-1) units together: 2(p-1)/3 halves are held, and those of the turns.
    """
    return _repeat("v_min", ranks, microbatches, Steps(1, 1, 1, 1))


def v_half(ranks: int, microbatches: int) -> Program:
    """Half of 1F1B's memory: down the V at half the speed, which leaves fewer bubbles than V-Min.

    The two halves of a microbatch live 6(p-1) units together: p-1 halves are held, and those of the turns.
    """
    return _repeat("v_half", ranks, microbatches, Steps(2, 1, 2, 1))


def _repeat(name: str, ranks: int, microbatches: int, steps: Steps) -> Program:
    """The block of microbatch k begins 6k units after the first; a rank's order is that of the times."""
    check_sizes(name, ranks, microbatches)
    where = v_shaped(ranks)

    def row(rank: int, times: list[int]) -> tuple[Action, ...]:
        chunks = chunks_of(where, rank)
        order = sorted(
            (time + PERIOD * k, op, chunk, k)
            for time, (op, chunk) in zip(times, ACTIONS, strict=True)
            for k in range(microbatches)
        )
        return tuple(compute(op, chunks[chunk], k) for _, op, chunk, k in order)

    rows = tuple(row(r, times) for r, times in enumerate(_block(ranks, steps)))
    return Program(rows, where, microbatches, name)


def _block(ranks: int, steps: Steps) -> list[list[int]]:
    """Times of each rank's actions: the waits at the three turns of the V that fit and hold the least."""

    def held(block: list[list[int]]) -> int:
        return max((w1 - f1) + (w0 - f0) for f0, f1, _, _, w1, w0 in block)

    waits = product(range(1, PERIOD + 1), repeat=3)
    blocks = ([_row(r, ranks, steps, *w) for r in range(ranks)] for w in waits)
    return min((b for b in blocks if all(len({t % PERIOD for t in row}) == PERIOD for row in b)), key=held)


def _row(rank: int, ranks: int, steps: Steps, down: int, up: int, back: int) -> list[int]:
    """A rank's times; down, up, back: from the last F of chunk 0 to the first of chunk 1, and so on.

    W takes the first unit after its B that is free modulo six.
    """
    above, below = rank, ranks - 1 - rank
    f0 = steps.f0 * above
    f1 = steps.f0 * (ranks - 1) + down + steps.f1 * below
    b1 = (steps.f0 + steps.f1) * (ranks - 1) + down + up + steps.b1 * above
    b0 = (steps.f0 + steps.f1 + steps.b1) * (ranks - 1) + down + up + back + steps.b0 * below
    times = [f0, f1, b1, b0]
    for b in (b1, b0):
        taken = {t % PERIOD for t in times}
        times.append(next((t for t in range(b + 1, b + PERIOD) if t % PERIOD not in taken), b))
    return times
