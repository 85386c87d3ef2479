"""Schedules with one stage a rank and fused backwards: GPipe, 1F1B, and forwards alone. Pure."""

from __future__ import annotations

from ..actions import Program
from .base import chain, check_sizes, write


def gpipe(ranks: int, microbatches: int) -> Program:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965, figure 2c).

    Every microbatch is in flight at once; bubble (p-1)/(m+p-1) of the step.
    """
    check_sizes("gpipe", ranks, microbatches)
    rows = tuple(write((r,), microbatches, ("F", microbatches), ("BW", microbatches)) for r in range(ranks))
    return Program(rows, chain(ranks), microbatches, "gpipe")


def one_f_one_b(ranks: int, microbatches: int) -> Program:
    """Warm-up forwards, then one forward, one backward in turn, then the rest of the backwards.

    PipeDream-flush (Narayanan et al., arXiv 2006.09503, figure 1b; arXiv 2104.04473, figure 4 top).
    Rank r holds at most min(p - r, m) microbatches; same bubble as GPipe.
    """
    check_sizes("1f1b", ranks, microbatches)
    m = max(microbatches, ranks)
    rows = tuple(
        write((r,), microbatches, ("F", ranks - 1 - r), ("F BW", m - (ranks - 1 - r)), ("BW", ranks - 1 - r))
        for r in range(ranks)
    )
    return Program(rows, chain(ranks), microbatches, "1f1b")


def forward_only(ranks: int, microbatches: int) -> Program:
    """Forwards in microbatch order, one stage a rank: inference."""
    check_sizes("forward", ranks, microbatches)
    rows = tuple(write((r,), microbatches, ("F", microbatches)) for r in range(ranks))
    return Program(rows, chain(ranks), microbatches, "forward")
