"""The one communication interface: a Group of ranks and the Work it returns.

Every operation is asynchronous: it returns a Work at once, and the buffers given belong to the
operation until ``wait`` returns. Sums are accumulated in rank order, in fp32 for 16-bit floats and
in the tensor's own dtype otherwise, and rounded once: the same bits on every rank and every host
transport.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .arrays import Array

ReduceOp = Literal["sum", "max", "min"]
REDUCE_OPS: tuple[ReduceOp, ...] = ("sum", "max", "min")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)

Lanes = Literal["independent", "fifo"]
"""How operations of one group progress: ``independent`` of each other, or each after the one before."""


class Work(ABC):
    """An operation under way."""

    @abstractmethod
    def done(self) -> bool:
        """True once the result is in the buffers; drives progress, never blocks. Raises like wait."""

    @abstractmethod
    def wait(self, deadline: float | None = None) -> None:
        """Block until done; ``deadline`` in seconds from now, None takes the group's.

        Raises DeadlineError naming operation, group, sequence number and the ranks that had not
        arrived; MismatchError if the ranks issued different operations (no buffer is changed).
        """


@dataclass(frozen=True)
class Transfer:
    """One entry of a batched send/receive."""

    kind: Literal["send", "recv"]
    tensor: Array
    peer: int


class Group(ABC):
    """An ordered set of ranks that communicate.

    Tensors are contiguous, of a dtype in DTYPES, on the CPU or (staged) on a GPU; arrays of other
    libraries are taken as tensors over the same memory (arrays.py). Zero-sized tensors are allowed
    everywhere. ``peer`` and ``root`` are ranks of this group.
    """

    name: str
    rank: int
    size: int
    members: tuple[int, ...]
    """World ranks of the members, in group order."""
    lanes: Lanes = "independent"
    deadline: float = 600.0
    """Default seconds a wait may take."""

    @abstractmethod
    def all_reduce(self, tensor: Array, op: ReduceOp = "sum") -> Work:
        """In place; every rank gets the reduction over ranks, in rank order."""

    @abstractmethod
    def reduce_scatter(self, output: Array, input: Array, op: ReduceOp = "sum") -> Work:
        """Rank r gets the reduction of chunk r; ``input.numel() == size * output.numel()``."""

    @abstractmethod
    def all_gather(self, output: Array, input: Array) -> Work:
        """Chunk r of output is rank r's input; ``output.numel() == size * input.numel()``.

        ``input`` may be this rank's own chunk of ``output``.
        """

    @abstractmethod
    def broadcast(self, tensor: Array, root: int = 0) -> Work:
        """In place from ``root``."""

    @abstractmethod
    def all_to_all(self, output: Array, input: Array) -> Work:
        """Chunk r of input goes to rank r; chunk r of output came from rank r; equal chunks."""

    @abstractmethod
    def send(self, tensor: Array, peer: int) -> Work:
        """To ``peer``; meets its receives from this rank in order."""

    @abstractmethod
    def recv(self, tensor: Array, peer: int) -> Work:
        """From ``peer``, in the order it sends."""

    @abstractmethod
    def barrier(self) -> Work:
        """Done when every rank has arrived."""

    @abstractmethod
    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        """Collective over this group: the subgroup of ``partition`` (disjoint lists of this group's
        ranks) that holds this rank. A rank in no list gets a Solo group."""

    @abstractmethod
    def close(self) -> None:
        """Release the group's resources; outstanding work is abandoned."""

    def check(self) -> None:
        """Collective, between operations: raise unless all ranks have issued the same operations.

        Nothing to do for a group that compares every operation when it is issued.
        """
        return

    def warm(self, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Collective: make connections now, for collectives or for the (sender, receiver) ``pairs``.

        Nothing to do for a group whose connections are there from the start.
        """
        return

    def batch(self, transfers: Sequence[Transfer]) -> Work:
        """Post several sends and receives that complete together, in any order, without deadlock."""
        post = {"send": self.send, "recv": self.recv}
        return Both(tuple(post[t.kind](t.tensor, t.peer) for t in transfers))


class Both(Work):
    """Several works as one."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = tuple(works)

    def done(self) -> bool:
        return all([w.done() for w in self._works])  # noqa: C419  (every work is driven)

    def wait(self, deadline: float | None = None) -> None:
        for w in self._works:
            w.wait(deadline)


class Done(Work):
    """Work that was complete when it was issued."""

    def done(self) -> bool:
        return True

    def wait(self, deadline: float | None = None) -> None:
        return None
