"""Which tokens a step trains on: a pure function of (seed, sample index), whatever the mesh."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError
from .blend import pattern, places, shares
from .order import keys, permute
from .tokens import Flat, Ids, Indices, Tokens

Batch = tuple[torch.Tensor, torch.Tensor]


OTHER_VOCABULARY = (
    "raise model.vocab, or give the type that the file was written with (data.token_dtype) and the tokenizer that "
    "wrote it (data.tokenizer)"
)
"""What to do about an id that is too large."""


@dataclass(frozen=True)
class Stretch:
    """A stream of tokens. limit: ids not below it are refused when they are read; None: all are known to be."""

    tokens: Tokens
    name: str = "the data"
    limit: int | None = None


class Where(NamedTuple):
    """Where samples begin: number of the stretch and of the token in it, one each per sample."""

    stretch: Indices
    start: Indices

    def part(self, begin: int, end: int) -> Where:
        return Where(self.stretch[begin:end], self.start[begin:end])


class Samples(ABC):
    """An endless order of samples: windows of ``seq`` inputs with their next tokens."""

    seq: int

    @property
    @abstractmethod
    def stretches(self) -> Sequence[Stretch]: ...

    @property
    @abstractmethod
    def count(self) -> int:
        """Different windows, all sources together."""

    @abstractmethod
    def locate(self, samples: Indices) -> Where:
        """Where each sample begins, by global sample index."""

    @abstractmethod
    def epochs(self, samples: int) -> list[tuple[str, int, float]]:
        """Name, windows and epochs of each source within the first ``samples`` samples."""

    def read(self, where: Where) -> Batch:
        """Inputs and targets, int64 [n, seq] each. Raises ConfigError for an id that is not below its limit."""
        first = int(where.stretch[0])
        if len(self.stretches) == 1 or (where.stretch == first).all():
            return _pair(_checked(self.stretches[first], where.start, self.seq))
        rows = np.empty((len(where.start), self.seq + 1), dtype=np.int64)
        for index in np.unique(where.stretch):
            mine = where.stretch == index
            rows[mine] = _checked(self.stretches[index], where.start[mine], self.seq)
        return _pair(rows)

    def take(self, first: int, count: int) -> Batch:
        """Samples ``first`` to ``first + count``."""
        return self.read(self.locate(np.arange(first, first + count, dtype=np.int64)))

    def batch(self, step: int, size: int, dp: int = 1, dp_rank: int = 0) -> Batch:
        """What dp rank ``dp_rank`` of ``dp`` has of the batch number ``step``, of ``size`` samples over all."""
        share = share_of(size, dp)
        return self.take(step * size + dp_rank * share, share)


def share_of(size: int, dp: int) -> int:
    """Samples of a batch of ``size`` on each of ``dp`` ranks; raises ConfigError where they cannot be equal."""
    if size % dp:
        raise ConfigError(f"a batch of {size} samples cannot be split evenly over dp={dp}")
    return size // dp


def _pair(rows: Ids) -> Batch:
    """``[n, seq + 1]`` tokens of any integer dtype as contiguous int64 inputs and targets."""
    x, y = rows[:, :-1].astype(np.int64, order="C"), rows[:, 1:].astype(np.int64, order="C")
    return torch.from_numpy(x), torch.from_numpy(y)


def _checked(stretch: Stretch, starts: Indices, seq: int) -> Ids:
    rows = stretch.tokens.windows(starts, seq + 1)
    if stretch.limit is not None and (int(rows.max()) >= stretch.limit or int(rows.min()) < 0):
        row, column = (int(i[0]) for i in np.nonzero((rows >= stretch.limit) | (rows < 0)))
        raise ConfigError(
            f"token {starts[row] + column} of {stretch.name} is {rows[row, column]}, and the vocabulary has "
            f"{stretch.limit} tokens; {OTHER_VOCABULARY}"
        )
    return rows


@dataclass(frozen=True)
class Windows(Samples):
    """Stretches cut into windows, which together make an epoch.

    Every window is seen once per epoch, in an order drawn for the epoch; each epoch cuts at other
    offsets. Sample i belongs to epoch ``i // count``.
    """

    parts: tuple[Stretch, ...]
    seq: int
    seed: int
    shuffle: bool = True

    @classmethod
    def of(cls, array: Ids, seq: int, seed: int, shuffle: bool = True) -> Windows:
        """Windows of a single array."""
        return cls((Stretch(Flat(array)),), seq, seed, shuffle)

    @property
    def stretches(self) -> Sequence[Stretch]:
        return self.parts

    @cached_property
    def _bounds(self) -> Indices:
        """First window of each stretch, and the number of all: as many as fit at every offset."""
        spare = self.seq if self.shuffle else 1
        counts = [max(0, (len(part.tokens) - spare) // self.seq) for part in self.parts]
        return np.cumsum([0, *counts], dtype=np.int64)

    @property
    def count(self) -> int:
        return int(self._bounds[-1])

    def epochs(self, samples: int) -> list[tuple[str, int, float]]:
        return [(self.parts[0].name if len(self.parts) == 1 else "all sources", self.count, samples / self.count)]

    def locate(self, samples: Indices) -> Where:
        if not self.shuffle:
            return self._at(samples % self.count, np.zeros(len(self.parts), dtype=np.int64))
        stretch, start = np.empty_like(samples), np.empty_like(samples)
        epochs = samples // self.count
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            offsets = np.array([self._offset(epoch, k) for k in range(len(self.parts))])
            order = permute(samples[mine] % self.count, self.count, self.seed, epoch)
            stretch[mine], start[mine] = self._at(order, offsets)
        return Where(stretch, start)

    def _offset(self, epoch: int, part: int) -> int:
        """Where an epoch begins to cut a stretch."""
        return int(keys(self.seed, epoch, 1 + part)[0] % np.uint64(self.seq))

    def _at(self, windows: Indices, offsets: Indices) -> Where:
        stretch = np.searchsorted(self._bounds, windows, side="right") - 1
        return Where(stretch, offsets[stretch] + self.seq * (windows - self._bounds[stretch]))


@dataclass(frozen=True)
class Blend(Samples):
    """Several sources by weight: each goes through its own epochs, as fast as its weight says.

    Within any first n samples each source has its share to less than one sample; see :mod:`.blend`.
    """

    sources: tuple[Windows, ...]
    weights: tuple[float, ...]
    seq: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seq", self.sources[0].seq)

    @cached_property
    def stretches(self) -> Sequence[Stretch]:
        return tuple(part for source in self.sources for part in source.parts)

    @property
    def count(self) -> int:
        return sum(source.count for source in self.sources)

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return shares(self.weights)

    @cached_property
    def _pattern(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each sample of the pattern, and its number among that source's."""
        order = pattern(self._counts)
        return order, places(order)

    def epochs(self, samples: int) -> list[tuple[str, int, float]]:
        rounds, rest = divmod(samples, sum(self._counts))
        used = [n * rounds + int((self._pattern[0][:rest] == k).sum()) for k, n in enumerate(self._counts)]
        names = [source.parts[0].name for source in self.sources]
        counts = [source.count for source in self.sources]
        return [(name, count, n / count) for name, count, n in zip(names, counts, used, strict=True)]

    def split(self, samples: Indices) -> tuple[Indices, Indices]:
        """Source of each sample, and its index within that source."""
        rounds, at = np.divmod(samples, sum(self._counts))
        source = self._pattern[0][at]
        return source, rounds * np.array(self._counts)[source] + self._pattern[1][at]

    def locate(self, samples: Indices) -> Where:
        source, inner = self.split(samples)
        stretch, start = np.empty_like(samples), np.empty_like(samples)
        first = 0
        for k, windows in enumerate(self.sources):
            mine = source == k
            if mine.any():
                at = windows.locate(inner[mine])
                stretch[mine], start[mine] = at.stretch + first, at.start
            first += len(windows.parts)
        return Where(stretch, start)
