"""The pass that recomputes activations instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterator

from ..actions import Action, Program, replace_ranks
from ..placement import Placement


def add_recompute(program: Program) -> Program:
    """R before each backward (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).

    F then keeps only what went into each unit. A schedule that places R itself, into a bubble say,
    is left as it is.
    """
    if any(a.op == "R" for row in program.ranks for a in row):
        return program

    def row(actions: tuple[Action, ...]) -> Iterator[Action]:
        for a in actions:
            if a.op in ("B", "BW"):
                yield a._replace(op="R")
            yield a

    return replace_ranks(program, map(row, program.ranks))


def recomputed_units(placement: Placement, units: int) -> frozenset[int]:
    """Units that R is for, of so many: all but the loss, whose backward follows its forward. With ``budget`` those
    are recomputed until their sizes are known, and some of them afterwards: an R of any other does nothing."""
    return frozenset(range(units - 1) if placement.activations in ("recompute", "budget") else ())
