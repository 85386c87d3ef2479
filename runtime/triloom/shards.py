"""Shard arithmetic: who holds which part of a parameter. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


def split_even(total: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of ``total`` items over ``parts``; sizes differ by at most one, larger first."""
    base, extra = divmod(total, parts)
    bounds = [0]
    for i in range(parts):
        bounds.append(bounds[-1] + base + (i < extra))
    return tuple(pairwise(bounds))


@dataclass(frozen=True)
class ShardSpec:
    """How a rank's local parameter sits in the global one.

    A layer that shards its parameters over tp carries ``shards: dict[str, ShardSpec]`` keyed by
    its own parameter names; parameters not named there are whole and equal on every tp rank.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    """Dimension split over tp; None: replicated."""
    slices: tuple[tuple[int, int], ...] = ()
    """Half-open global ranges along ``dim`` that make up the local tensor, in local order."""
    partial_grad: bool = False
    """Replicated, but each tp rank's gradient is one term of a sum over tp (sequence parallelism)."""
