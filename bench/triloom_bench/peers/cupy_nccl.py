"""cupy's own binding of NCCL, called as its documentation does: pointers, on the current stream, nothing checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from triloom.boot import World
from triloom.groups.nccl import DTYPE_CODES, REDUCE_CODES
from triloom.groups.objects import broadcast_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..comm import Buffers

Call = Callable[[], object]
MAX = REDUCE_CODES["max"]


@dataclass(frozen=True)
class CupyNccl:
    """comm: a ``cupy.cuda.nccl.NcclCommunicator``. begin, end: of a group of calls. stream: the address of one."""

    comm: Any
    rank: int
    size: int
    begin: Callable[[], object]
    end: Callable[[], object]
    stream: Callable[[], int]

    @contextmanager
    def together(self) -> Iterator[None]:
        self.begin()
        yield
        self.end()

    def close(self) -> None:
        self.comm.destroy()


def start(world: World) -> CupyNccl:
    """A communicator of all ranks. Raises ImportError where cupy or its NCCL is missing."""
    import cupy
    from cupy.cuda import nccl

    cupy.cuda.Device(world.device.index).use()
    unique = broadcast_object(world.group, list(nccl.get_unique_id()) if world.rank == 0 else None)
    comm = nccl.NcclCommunicator(world.size, tuple(unique), world.rank)
    stream = lambda: torch.cuda.current_stream().cuda_stream  # noqa: E731
    return CupyNccl(comm, world.rank, world.size, nccl.groupStart, nccl.groupEnd, stream)


def all_reduce(c: CupyNccl, b: Buffers) -> Call:
    at, n, dtype = b.whole.data_ptr(), b.whole.numel(), DTYPE_CODES[b.whole.dtype]
    return lambda: c.comm.allReduce(at, at, n, dtype, MAX, c.stream())


def reduce_scatter(c: CupyNccl, b: Buffers) -> Call:
    at, to, n, dtype = b.whole.data_ptr(), b.part.data_ptr(), b.part.numel(), DTYPE_CODES[b.part.dtype]
    return lambda: c.comm.reduceScatter(at, to, n, dtype, MAX, c.stream())


def all_gather(c: CupyNccl, b: Buffers) -> Call:
    at, to, n, dtype = b.part.data_ptr(), b.whole.data_ptr(), b.part.numel(), DTYPE_CODES[b.part.dtype]
    return lambda: c.comm.allGather(at, to, n, dtype, c.stream())


def broadcast(c: CupyNccl, b: Buffers) -> Call:
    at, n, dtype = b.whole.data_ptr(), b.whole.numel(), DTYPE_CODES[b.whole.dtype]
    return lambda: c.comm.broadcast(at, at, n, dtype, 0, c.stream())


def all_to_all(c: CupyNccl, b: Buffers) -> Call:
    n, dtype = b.whole.numel() // c.size, DTYPE_CODES[b.whole.dtype]
    chunks = [(b.whole[r * n :].data_ptr(), b.other[r * n :].data_ptr()) for r in range(c.size)]

    def once() -> None:
        with c.together():
            for r, (at, to) in enumerate(chunks):
                c.comm.send(at, n, dtype, r, c.stream())
                c.comm.recv(to, n, dtype, r, c.stream())

    return once


def transfer(c: CupyNccl, b: Buffers, *, echo: bool) -> Call:
    """From rank 0 to rank 1, and back for an echo."""
    at, n, dtype = b.whole.data_ptr(), b.whole.numel(), DTYPE_CODES[b.whole.dtype]

    def once() -> None:
        for sender in (0, 1)[: 1 + echo]:
            if c.rank < 2:
                (c.comm.send if c.rank == sender else c.comm.recv)(at, n, dtype, 1 - c.rank, c.stream())

    return once


CALLS: Mapping[str, Callable[[CupyNccl, Buffers], Call]] = {
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "broadcast": broadcast,
    "all_to_all": all_to_all,
}
