"""Which parameters had a gradient in a step: on any microbatch and on any rank. A bit each, agreed with the norm.

An optimizer of torch leaves alone what has no gradient: no decay, no moments, no count of updates. One rank
cannot know that, since the parameter's gradient may be elsewhere (another dp rank's experts, another use of a tied
matrix), so every rank tells what it saw in the one exchange that a step has anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..groups.base import Group
from ..groups.objects import gather_objects

_WORD = 8
"""Bytes of a word of bits."""


@dataclass(frozen=True)
class Presence:
    """The layout of the bits: of all ties of the model first, then of the parameters of this pipeline coordinate.

    peers: the ranks of the world at this coordinate, which hold the same parameters in the same order. words: int64
    words of every rank.
    """

    names: tuple[str, ...]
    tie_of: Mapping[str, int]
    """Tie index of the tied ones among ``names``."""
    ties: int
    peers: tuple[int, ...]
    words: int

    def pack(self, present: Sequence[bool]) -> torch.Tensor:
        """int64 (words,): of this rank, whose parameters have a gradient or not."""
        bits = 0
        for i, (name, there) in enumerate(zip(self.names, present, strict=True)):
            if there:
                bits |= 1 << (self.ties + i)
                if name in self.tie_of:
                    bits |= 1 << self.tie_of[name]
        return torch.frombuffer(bytearray(bits.to_bytes(_WORD * self.words, "little")), dtype=torch.int64)

    def absent(self, rows: torch.Tensor) -> frozenset[str]:
        """Names without a gradient anywhere. rows: int64 (ranks, words) of all ranks."""
        of_rank = [int.from_bytes(row.tobytes(), "little") for row in rows.numpy()]
        own = everyone = 0
        for rank in self.peers:
            own |= of_rank[rank]
        for bits in of_rank:
            everyone |= bits
        if (own >> self.ties) == (1 << len(self.names)) - 1:
            return frozenset()
        bit = {n: everyone >> self.tie_of[n] if n in self.tie_of else own >> (self.ties + i)
               for i, n in enumerate(self.names)}  # fmt: skip
        return frozenset(n for n in self.names if not bit[n] & 1)


def agree_on_layout(world: Group, coord: int, names: Sequence[str], tie_of: Mapping[str, int]) -> Presence:
    """The bits of every rank; collective. coord: this rank's pipeline coordinate."""
    everyone = gather_objects(world, [coord, len(names), max(tie_of.values(), default=-1) + 1])
    ties = max(t for _, _, t in everyone)
    bits = ties + max(n for _, n, _ in everyone)
    peers = tuple(rank for rank, (c, _, _) in enumerate(everyone) if c == coord)
    return Presence(tuple(names), dict(tie_of), ties, peers, max(1, -(-bits // (8 * _WORD))))
