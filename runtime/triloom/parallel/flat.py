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
    whole: bool = False
    """No parameter is cut by the boundary of a shard."""

    @property
    def padding(self) -> int:
        return self.numel - sum(s.numel for s in self.slots)

    @property
    def gaps(self) -> tuple[slice, ...]:
        """The padding: behind parameters, and at the end."""
        starts = [*(s.offset for s in self.slots), self.numel]
        stops = [0, *(s.stop for s in self.slots)]
        return tuple(slice(a, b) for a, b in zip(stops, starts, strict=True) if a < b)

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
    rule: int = 0
    """Number of the optimizer's rule that updates it."""
    whole: bool = False
    """The rule needs the whole tensor on one dp rank."""
    treatment: int = 0
    """Number of the treatment: in a bucket those that are treated alike lie side by side, so that one call of
    the rule updates them."""
    size: int | None = None
    """What counts where buckets are cut and tensors dealt, the same on every tp rank; None: the elements here."""

    stays: bool = False
    """Stays whole where others are sharded."""

    @property
    def kind(self) -> tuple[str, bool, bool]:
        """Parameters share a bucket only with their like: tied ones are reduced at another time."""
        return self.dtype, self.tied, self.stays

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def room(self) -> int:
        """Elements up to where the next parameter may start."""
        return -(-self.numel // ALIGN) * ALIGN

    @property
    def weight(self) -> int:
        return self.numel if self.size is None else self.size


def layout(params: Sequence[Entry], *, bucket_numel: int, dp: int) -> tuple[Bucket, ...]:
    """Buckets of one kind and rule, of at least one parameter and otherwise at most ``bucket_numel`` elements.

    params: in unit order. A unit's parameters stay together where they fit, so that gathering a
    bucket for a unit gathers little else.

    Parameters of a rule on whole tensors are given to the dp ranks so that none is cut and the largest
    share is small; all shares are padded to it. A bucket of them grows beyond ``bucket_numel`` until at most one
    element in SLACK is padding.
    """
    packer = Packer(bucket_numel, dp)
    runs = [run for _, unit in groupby(params, key=lambda e: e.unit) for run in packer.add(list(unit))]
    runs = sorted([*runs, *packer.close()], key=place)
    return tuple(make_bucket(i, run, dp) for i, run in enumerate(runs))


class Packer:
    """The same while units come one after the other: a run of parameters is given back when its bucket is full."""

    def __init__(self, bucket_numel: int, dp: int) -> None:
        self._limit, self._dp = bucket_numel, dp
        self._open: dict[int, list[Entry]] = {}
        """By rule, the run that may still grow."""

    def add(self, unit: Sequence[Entry]) -> list[list[Entry]]:
        """The trainable parameters of the next unit; returns the runs that are full now."""
        rules = sorted({e.rule for e in unit})
        return [run for rule in rules for run in self._add([e for e in unit if e.rule == rule])]

    def _add(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        full, run = [], self._open.setdefault(entries[0].rule, [])
        fits = _weight(run) + _weight(entries) <= self._limit
        for e in entries:
            over = not fits or _weight(run) + e.weight > self._limit
            if run and (run[-1].kind != e.kind or (over and _balanced(run, self._dp))):
                full.append(run)
                run, fits = [], True
            run.append(e)
        self._open[entries[0].rule] = run
        return full

    def close(self) -> list[list[Entry]]:
        """The runs that are not full."""
        rest = [run for run in self._open.values() if run]
        self._open = {}
        return rest


def _weight(entries: Sequence[Entry]) -> int:
    return sum(e.weight for e in entries)


def place(run: Sequence[Entry]) -> tuple[int, int]:
    """Key that sorts full runs (of one rule in the order in which they became so)."""
    return run[0].unit, run[0].rule


def make_bucket(index: int, run: Sequence[Entry], dp: int) -> Bucket:
    """The bucket of a run."""
    return (_dealt if run[0].whole else _bucket)(index, run, dp)


SLACK = 8
"""Buckets of whole parameters try to have no more than one element of padding in so many."""


def _balanced(run: Sequence[Entry], dp: int) -> bool:
    if not run[0].whole:
        return True
    bucket = _dealt(0, run, dp)
    return bucket.padding * SLACK <= bucket.numel


def _bucket(index: int, run: Sequence[Entry], dp: int) -> Bucket:
    slots = []
    offset = 0
    for e in sorted(run, key=lambda e: e.treatment):
        slots.append(Slot(e.name, e.unit, e.shape, offset))
        offset += e.room
    multiple = dp * ALIGN
    return Bucket(index, tuple(slots), -(-offset // multiple) * multiple, run[0].dtype)


def _dealt(index: int, run: Sequence[Entry], dp: int) -> Bucket:
    """Whole parameters, the largest first, each to the rank that has the least (at most 4/3 of the best possible
    largest share: Graham, SIAM J. Appl. Math. 17, 1969)."""
    loads, stops = [0] * dp, [0] * dp
    where: list[tuple[int, int, Entry]] = []
    for e in sorted(run, key=lambda e: -e.weight // ALIGN):
        rank = loads.index(min(loads))
        where.append((rank, stops[rank], e))
        loads[rank] += -(-e.weight // ALIGN) * ALIGN
        stops[rank] += e.room
    share = max(stops)
    slots = sorted((Slot(e.name, e.unit, e.shape, rank * share + at) for rank, at, e in where), key=lambda s: s.offset)
    return Bucket(index, tuple(slots), dp * share, run[0].dtype, whole=True)


def pieces(bucket: Bucket, rank: int, dp: int) -> tuple[Piece, ...]:
    """What of each parameter dp rank ``rank`` owns, in bucket order; empty intersections left out."""
    lo, hi = bucket.shard(rank, dp)
    cut = (Piece(s, max(s.offset, lo), min(s.stop, hi)) for s in bucket.slots)
    return tuple(p for p in cut if p.start < p.stop)
