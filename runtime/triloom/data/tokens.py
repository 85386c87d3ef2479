"""Streams of token ids, read in place: one array, or one with a token put after every document."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..errors import ConfigError

Ids = NDArray[Any]
"""Token ids, one-dimensional, of any integer dtype."""
Indices = NDArray[np.int64]

PIECE, PIECES = 64 << 10, 1024
"""Elements of a large stream that a fingerprint or a look at the ids reads: so many evenly spread pieces of so many."""


class Tokens(Protocol):
    """A stream of token ids."""

    def __len__(self) -> int: ...

    def windows(self, starts: Indices, length: int) -> Ids:
        """``length`` tokens from each start, ``[n, length]``; every window lies inside the stream."""
        ...

    def part(self, begin: int, end: int) -> Tokens:
        """The tokens ``begin`` to ``end`` as a stream of their own."""
        ...

    def digest(self) -> int:
        """63-bit fingerprint of length and content (of a large stream: of evenly spread pieces)."""
        ...

    def bounds(self) -> tuple[int, int]:
        """Least and largest id (of a large stream: in evenly spread pieces)."""
        ...


@dataclass(frozen=True, eq=False)
class Flat:
    """Tokens that are one array, in memory or mapped from a file."""

    array: Ids

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def _plain(self) -> Ids:
        """The same memory without numpy.memmap's bookkeeping, which costs microseconds at each slice."""
        return self.array.view(np.ndarray)

    def windows(self, starts: Indices, length: int) -> Ids:
        if len(starts) and not (starts.min() >= 0 and starts.max() + length <= len(self.array)):
            raise IndexError(f"windows of {length} from {starts.min()} to {starts.max()} of {len(self.array)} tokens")
        step = self._plain.strides[0]
        rows = as_strided(self._plain, (len(self.array) - length + 1, length), (step, step), writeable=False)
        out: Ids = rows[starts]
        return out

    def part(self, begin: int, end: int) -> Flat:
        return Flat(self.array[begin:end])

    def digest(self) -> int:
        hasher = hashlib.blake2b(len(self.array).to_bytes(8, "little"), digest_size=8)
        for piece in self._pieces():
            hasher.update(np.ascontiguousarray(piece).data)
        return int.from_bytes(hasher.digest(), "little") >> 1

    def bounds(self) -> tuple[int, int]:
        pieces = self._pieces()
        return min(int(p.min()) for p in pieces), max(int(p.max()) for p in pieces)

    def _pieces(self) -> list[Ids]:
        if len(self.array) <= PIECE * PIECES:
            return [self._plain]
        starts = np.linspace(0, len(self.array) - PIECE, PIECES, dtype=np.int64)
        return [self._plain[start : start + PIECE] for start in starts]


@dataclass(frozen=True, eq=False)
class Documents:
    """An array of documents, each followed by the token ``eos``, which the array does not hold.

    ends: int64, where each document ends in the array, ascending; the last is the array's length.
    begin, end: the part of the whole stream that this is.
    """

    array: Ids
    ends: Indices
    eos: int
    begin: int
    end: int

    @classmethod
    def of(cls, array: Ids, ends: Indices, eos: int) -> Documents:
        """The whole stream. Raises ConfigError for an ``eos`` that the array's dtype cannot hold."""
        most = int(np.iinfo(array.dtype).max)
        if not 0 <= eos <= most:
            raise ConfigError(f"data.eos = {eos} is not an id of a {array.dtype} file, 0 to {most}")
        return cls(array.view(np.ndarray), ends, eos, 0, len(array) + len(ends))

    def __len__(self) -> int:
        return self.end - self.begin

    @cached_property
    def _marks(self) -> Indices:
        """Where the added tokens stand in the whole stream."""
        return self.ends + np.arange(len(self.ends))

    def windows(self, starts: Indices, length: int) -> Ids:
        first = starts + self.begin
        before = np.searchsorted(self._marks, first)
        until = np.searchsorted(self._marks, first + length)
        out = np.empty((len(starts), length), self.array.dtype)
        for row, start, skipped, stop in zip(out, first, before, until, strict=True):
            source = self.array[start - skipped : start - skipped + length - (stop - skipped)]
            if skipped == stop:
                row[:] = source
                continue
            text = np.ones(length, dtype=bool)
            text[self._marks[skipped:stop] - start] = False
            row[text] = source
            row[~text] = self.eos
        return out

    def part(self, begin: int, end: int) -> Documents:
        return Documents(self.array, self.ends, self.eos, self.begin + begin, self.begin + end)

    def digest(self) -> int:
        hasher = hashlib.blake2b(digest_size=8)
        parts = (Flat(self.array).digest(), Flat(self.ends).digest(), self.eos, self.begin, self.end)
        hasher.update(np.array(parts, dtype=np.int64).data)
        return int.from_bytes(hasher.digest(), "little") >> 1

    def bounds(self) -> tuple[int, int]:
        low, high = Flat(self.array).bounds()
        return min(low, self.eos), max(high, self.eos)
