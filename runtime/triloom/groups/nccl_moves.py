"""What each Group operation is in NCCL calls, and how sums are made.

A move runs with the group's stream waiting for its inputs; it issues NCCL calls and, on the same
stream, torch operations, and returns the temporaries that must live until the stream has passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from triloom_kernels.table import default

from ..errors import ConfigError
from ..native import reduce_ranks
from .base import ReduceOp
from .nccl import DTYPE_CODES, REDUCE_CODES
from .nccl_comm import Communicator
from .nccl_streams import Streams
from .reduction import chunk_bounds

Sums = Literal["upcast", "ordered", "native"]
"""How 16-bit floats are summed.

``upcast``: converted to fp32, summed by NCCL, rounded once. Twice the bytes; the order is NCCL's (the same
    from run to run for the same communicator, size and settings), so bits may differ from the host's.
``ordered``: all_to_all, then a local sum in fp32 in rank order, rounded once: the bits of every host
    transport, and independent of bucket sizes. As many bytes as native, but latency grows with the ranks
    and no NVLink reduction is used.
``native``: NCCL sums in 16 bits and may round at every rank: the fewest bytes, the largest error.

With two ranks there is one addition and one rounding, which all three give: native is used then.
"""
SUMS: tuple[Sums, ...] = ("upcast", "ordered", "native")
HALVES = (torch.bfloat16, torch.float16)
_KERNELS = default()


def choose(dtype: torch.dtype, op: ReduceOp, size: int, sums: Sums, exact: bool) -> Sums:
    """Which way a reduction goes.

    exact: ``ordered`` for every float dtype, and for max and min, whose NaN then wins as on the host
    (NCCL's may drop it). Integers are exact anyway, and so is the one addition of two ranks.
    """
    if sums not in SUMS:
        raise ConfigError(f"sums must be one of {', '.join(SUMS)}, got {sums!r}")
    if not dtype.is_floating_point or size == 1 or (size == 2 and op == "sum"):
        return "native"
    if exact:
        return "ordered"
    return sums if dtype in HALVES and op == "sum" else "native"


class Piece(NamedTuple):
    """One send or receive of a batch."""

    kind: Literal["send", "recv"]
    tensor: torch.Tensor
    peer: int


class Move(NamedTuple):
    """One operation on flat tensors: ``output`` and ``input`` may be the same one, or overlap as Group allows."""

    comm: Communicator
    streams: Streams
    rank: int
    size: int
    deadline: float
    doing: str
    output: torch.Tensor
    input: torch.Tensor
    reduce: ReduceOp
    root: int

    def call(self, body: Callable[[int], bool]) -> None:
        self.comm.issue(body, self.deadline, self.doing)

    def exchange(self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]) -> None:
        """Sends and receives with peers as one NCCL group; this rank's own part is copied."""
        others = [Piece("send", t, peer) for t, peer in sends if peer != self.rank and t.numel()]
        others += [Piece("recv", t, peer) for t, peer in receives if peer != self.rank and t.numel()]
        if others:
            self.call(lambda comm: transfers(self.comm, comm, self.streams.address, others))
        mine = [[t for t, peer in part if peer == self.rank] for part in (sends, receives)]
        with self.streams.scope():
            for source, target in zip(*mine, strict=True):
                if target.data_ptr() != source.data_ptr():
                    target.copy_(source)


def transfers(comm: Communicator, handle: int, stream: int, batch: Sequence[Piece]) -> bool:
    """Issue a batch as one NCCL group, which completes in any order; true if NCCL is still at it."""
    nccl = comm.library
    post = {"send": nccl.send, "recv": nccl.recv}
    nccl.group_start()
    try:
        for t in batch:
            tensor = t.tensor
            post[t.kind](tensor.data_ptr(), tensor.numel(), DTYPE_CODES[tensor.dtype], t.peer, handle, stream)
    except BaseException:
        try:
            nccl.group_end()  # leaves the thread's group, with nothing or with what NCCL makes of the half
        finally:
            raise
    return nccl.group_end()


Temporaries = tuple[torch.Tensor, ...]


def _reduce(m: Move, output: torch.Tensor, input: torch.Tensor, count: int, *, scatter: bool) -> None:
    nccl = m.comm.library
    function = nccl.reduce_scatter if scatter else nccl.all_reduce
    codes = DTYPE_CODES[input.dtype], REDUCE_CODES[m.reduce]
    m.call(lambda comm: function(input.data_ptr(), output.data_ptr(), count, *codes, comm, m.streams.address))


def _native_all_reduce(m: Move) -> Temporaries:
    _reduce(m, m.output, m.input, m.input.numel(), scatter=False)
    return ()


def _native_reduce_scatter(m: Move) -> Temporaries:
    _reduce(m, m.output, m.input, m.output.numel(), scatter=True)
    return ()


def _upcast_all_reduce(m: Move) -> Temporaries:
    with m.streams.scope():
        wide = m.input.float()
    _reduce(m, wide, wide, wide.numel(), scatter=False)
    with m.streams.scope():
        m.output.copy_(wide)
    return (wide,)


def _upcast_reduce_scatter(m: Move) -> Temporaries:
    with m.streams.scope():
        wide = m.input.float()
    n = m.output.numel()
    own = wide[m.rank * n : (m.rank + 1) * n]
    _reduce(m, own, wide, n, scatter=True)
    with m.streams.scope():
        m.output.copy_(own)
    return (wide,)


def _ordered_all_reduce(m: Move) -> Temporaries:
    bounds = chunk_bounds(m.input.numel(), m.size)
    pieces = [m.input[lo:hi] for lo, hi in bounds]
    own = pieces[m.rank]
    with m.streams.scope():
        parts = own.new_empty(m.size, own.numel())
    m.exchange([(piece, r) for r, piece in enumerate(pieces)], [(parts[r], r) for r in range(m.size)])
    with m.streams.scope():
        _fold(own, parts, m.reduce)
    m.exchange([(own, r) for r in range(m.size)], [(piece, r) for r, piece in enumerate(pieces)])
    return (parts,)


def _fold(out: torch.Tensor, parts: torch.Tensor, op: ReduceOp) -> None:
    """``parts[0] op parts[1] op ...`` in rank order; a sum in one kernel."""
    if op == "sum" and out.is_cuda and out.dtype in (torch.float32, *HALVES):
        _KERNELS.pick("rank_sum_", out.device)(out, parts)
    else:
        reduce_ranks(out, list(parts), op)


def _ordered_reduce_scatter(m: Move) -> Temporaries:
    n = m.output.numel()
    with m.streams.scope():
        parts = m.input.new_empty(m.size, n)
    m.exchange([(c, r) for r, c in enumerate(m.input.view(m.size, n))], [(parts[r], r) for r in range(m.size)])
    with m.streams.scope():
        _fold(m.output, parts, m.reduce)
    return (parts,)


def _all_gather(m: Move) -> Temporaries:
    nccl, n, dtype = m.comm.library, m.input.numel(), DTYPE_CODES[m.input.dtype]
    m.call(lambda comm: nccl.all_gather(m.input.data_ptr(), m.output.data_ptr(), n, dtype, comm, m.streams.address))
    return ()


def _broadcast(m: Move) -> Temporaries:
    nccl, at, dtype = m.comm.library, m.input.data_ptr(), DTYPE_CODES[m.input.dtype]
    m.call(lambda comm: nccl.broadcast(at, at, m.input.numel(), dtype, m.root, comm, m.streams.address))
    return ()


def _all_to_all(m: Move) -> Temporaries:
    chunks = [t.view(m.size, -1) for t in (m.input, m.output)]
    m.exchange([(c, r) for r, c in enumerate(chunks[0])], [(c, r) for r, c in enumerate(chunks[1])])
    return ()


REDUCTIONS: dict[tuple[str, Sums], Callable[[Move], Temporaries]] = {
    ("all_reduce", "native"): _native_all_reduce,
    ("all_reduce", "upcast"): _upcast_all_reduce,
    ("all_reduce", "ordered"): _ordered_all_reduce,
    ("reduce_scatter", "native"): _native_reduce_scatter,
    ("reduce_scatter", "upcast"): _upcast_reduce_scatter,
    ("reduce_scatter", "ordered"): _ordered_reduce_scatter,
}
MOVES: dict[str, Callable[[Move], Temporaries]] = {
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
}
