"""The flat layout: parameters in unit order, cut into buckets, each bucket split evenly over dp.

One layout serves parameters, gradients and optimizer state, and every ZeRO stage, so that a
stage changes where bytes live and never which numbers are added. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

ALIGN = 64
"""Elements. A shard starts on a cache line and a vector in every dtype, and between the blocks of
``native.sum_squares`` (SUM_BLOCK divides ALIGN)."""


@dataclass(frozen=True)
class Slot:
    """One parameter inside a bucket; offset and numel in elements."""

    name: str
    unit: int
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Bucket:
    """A contiguous run of parameters. numel counts padding and divides by ``dp * ALIGN``."""

    index: int
    slots: tuple[Slot, ...]
    numel: int
    dtype: str
    """Torch dtype name of the parameters."""

    @property
    def padding(self) -> int:
        return self.numel - sum(s.numel for s in self.slots)

    @property
    def units(self) -> tuple[int, ...]:
        return tuple(sorted({s.unit for s in self.slots}))

    def shard(self, rank: int, dp: int) -> tuple[int, int]:
        """Half-open range of the bucket that dp rank ``rank`` owns."""
        size = self.numel // dp
        return rank * size, (rank + 1) * size


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that lies in one dp shard; start and stop count in the bucket."""

    slot: Slot
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """A trainable parameter to be laid out; shape is the rank's local one."""

    name: str
    unit: int
    shape: tuple[int, ...]
    dtype: str
    tied: bool = False

    @property
    def kind(self) -> tuple[str, bool]:
        """Parameters share a bucket only with their like: tied ones are reduced at another time."""
        return self.dtype, self.tied


def layout(params: Sequence[Entry], *, bucket_numel: int, dp: int) -> tuple[Bucket, ...]:
    """Buckets of one kind, of at least one parameter and otherwise at most ``bucket_numel`` elements.

    params: in unit order. A unit's parameters stay together where they fit, so that gathering a
    bucket for a unit gathers little else.
    """
    runs: list[list[Entry]] = []
    filled = 0
    for _, group in groupby(params, key=lambda e: e.unit):
        entries = list(group)
        whole = sum(math.prod(e.shape) for e in entries)
        fits = filled + whole <= bucket_numel
        for e in entries:
            n = math.prod(e.shape)
            if not runs or not fits or filled + n > bucket_numel or runs[-1][-1].kind != e.kind:
                runs.append([])
                filled, fits = 0, True
            runs[-1].append(e)
            filled += n
    return tuple(_bucket(i, run, dp) for i, run in enumerate(runs))


def _bucket(index: int, run: Sequence[Entry], dp: int) -> Bucket:
    slots = []
    offset = 0
    for e in run:
        slots.append(Slot(e.name, e.unit, e.shape, offset))
        offset += -(-math.prod(e.shape) // ALIGN) * ALIGN
    multiple = dp * ALIGN
    return Bucket(index, tuple(slots), -(-offset // multiple) * multiple, run[0].dtype)


def pieces(bucket: Bucket, rank: int, dp: int) -> tuple[Piece, ...]:
    """What of each parameter dp rank ``rank`` owns, in bucket order; empty intersections left out."""
    lo, hi = bucket.shard(rank, dp)
    cut = (Piece(s, max(s.offset, lo), min(s.stop, hi)) for s in bucket.slots)
    return tuple(p for p in cut if p.start < p.stop)
