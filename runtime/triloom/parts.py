"""Which elements of a global tensor a flat piece on some rank holds, and where two such pieces meet. Pure.

A piece is a range of the flattened *local* tensor, which is the global one or the slices of it that a
tensor-parallel rank holds. In the global tensor that is a list of runs of neighbouring elements, so that what was
written in the pieces of one mesh is found from those of any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shards import ShardSpec

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Part:
    """Elements ``start`` to ``stop`` of a local tensor in row-major order."""

    start: int
    stop: int
    dim: int | None = None
    """Dimension of which the local tensor holds ``slices``; None: all of the global one."""
    slices: tuple[tuple[int, int], ...] = ()
    """Half-open global ranges along ``dim``, in local order."""

    @property
    def numel(self) -> int:
        return self.stop - self.start


class Runs(NamedTuple):
    """Neighbouring elements, ascending in the global tensor."""

    at: Ints
    """First element of each in the flattened global tensor."""
    here: Ints
    """First element of each in the piece, counted from the piece's start."""
    length: Ints


def part_of(spec: ShardSpec, start: int, stop: int) -> Part:
    """Elements ``start`` to ``stop`` of the local tensor of ``spec``; a split that leaves it whole counts as none."""
    if spec.dim is None or tuple(spec.slices) == ((0, spec.global_shape[spec.dim]),):
        return Part(start, stop)
    return Part(start, stop, spec.dim, tuple((int(lo), int(hi)) for lo, hi in spec.slices))


def local_shape(shape: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """Of the local tensor that the part is a range of."""
    if part.dim is None:
        return shape
    return (*shape[: part.dim], sum(hi - lo for lo, hi in part.slices), *shape[part.dim + 1 :])


def runs(shape: tuple[int, ...], part: Part) -> Runs:
    """Of a part of a tensor of global ``shape``."""
    if part.numel == 0:
        return Runs(*(np.zeros(0, np.int64) for _ in range(3)))
    if part.dim is None:
        return Runs(*(np.array([v], np.int64) for v in (part.start, 0, part.numel)))
    inner = math.prod(shape[part.dim + 1 :])
    lows = np.array([lo * inner for lo, _ in part.slices], np.int64)
    sizes = np.array([(hi - lo) * inner for lo, hi in part.slices], np.int64)
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    row = int(sizes.sum())
    rows = np.arange(part.start // row, -(-part.stop // row), dtype=np.int64)[:, None]
    at = (rows * (shape[part.dim] * inner) + lows).reshape(-1)
    local = (rows * row + before).reshape(-1)
    ends = np.minimum(local + np.tile(sizes, len(rows)), part.stop)
    cut = np.maximum(part.start - local, 0)
    at, local = at + cut, local + cut
    keep = ends > local
    at, local, length = at[keep], local[keep] - part.start, (ends - local)[keep]
    order = np.argsort(at, kind="stable")
    return Runs(at[order], local[order], length[order])


class Meeting(NamedTuple):
    """Elements that two pieces have in common: where in each, and how many in a row."""

    one: Ints
    two: Ints
    length: Ints


def meet(one: Runs, two: Runs) -> Meeting:
    """What two pieces of the same tensor have in common; the runs of a piece are disjoint."""
    ends_one, ends_two = one.at + one.length, two.at + two.length
    first = np.searchsorted(ends_two, one.at, side="right")
    count = np.maximum(np.searchsorted(two.at, ends_one, side="left") - first, 0)
    i = np.repeat(np.arange(len(one.at)), count)
    j = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    start = np.maximum(one.at[i], two.at[j])
    length = np.minimum(ends_one[i], ends_two[j]) - start
    return Meeting(one.here[i] + start - one.at[i], two.here[j] + start - two.at[j], length)
