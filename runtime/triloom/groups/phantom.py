"""A group whose other ranks do not exist: for tracing shapes, never for values."""

from __future__ import annotations

from collections.abc import Sequence

from .arrays import Array
from .base import Done, Group, ReduceOp, Work
from .solo import Solo


class Phantom(Group):
    """Rank ``rank`` of ``size``. Every operation is done at once and leaves its buffers as they are."""

    def __init__(self, rank: int, size: int, name: str = "phantom") -> None:
        self.name, self.rank, self.size, self.members = name, rank, size, tuple(range(size))

    def all_reduce(self, tensor: Array, op: ReduceOp = "sum") -> Work:
        return Done()

    def reduce_scatter(self, output: Array, input: Array, op: ReduceOp = "sum") -> Work:
        return Done()

    def all_gather(self, output: Array, input: Array) -> Work:
        return Done()

    def broadcast(self, tensor: Array, root: int = 0) -> Work:
        return Done()

    def all_to_all(self, output: Array, input: Array) -> Work:
        return Done()

    def send(self, tensor: Array, peer: int) -> Work:
        return Done()

    def recv(self, tensor: Array, peer: int) -> Work:
        return Done()

    def barrier(self) -> Work:
        return Done()

    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        for part in partition:
            if self.rank in part:
                return Phantom(list(part).index(self.rank), len(part), name)
        return Solo(self.rank, name)

    def close(self) -> None:
        return None
