"""How each operation moves its data over a Wire: small ones from the header rows, large ones in steps.

Everything here runs after the headers have agreed. ``output`` and ``input`` are flat host tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..native import reduce_ranks
from .fingerprint import Call
from .progress import Pending, Steps
from .reduction import chunk_bounds, reduce_addresses
from .staging import HostPool
from .wire import GATHER, SCATTER, Wire

_SEGMENT_BYTES = 1 << 20
"""Reductions go through a chunk in segments of this size, so that staging stays small and in cache."""


class Move(NamedTuple):
    """One collective about to move data."""

    call: Call
    seq: int
    output: torch.Tensor
    input: torch.Tensor
    wire: Wire
    pool: HostPool


Small = Callable[[Move, list[int]], None]
Large = Callable[[Move], Steps]


# -- small: this rank holds every rank's whole input; payloads are their addresses ----------------------


def _small_all_reduce(m: Move, payloads: list[int]) -> None:
    reduce_addresses(m.output.data_ptr(), payloads, m.input.dtype, m.output.numel(), m.call.reduce)


def _small_reduce_scatter(m: Move, payloads: list[int]) -> None:
    numel = m.output.numel()
    at = m.wire.rank * numel * m.input.element_size()
    reduce_addresses(m.output.data_ptr(), [p + at for p in payloads], m.input.dtype, numel, m.call.reduce)


def _small_all_gather(m: Move, payloads: list[int]) -> None:
    nbytes = m.input.numel() * m.input.element_size()
    out, copy = m.output.data_ptr(), m.wire.copy
    for r, payload in enumerate(payloads):
        copy(out + r * nbytes, payload, nbytes)


def _small_broadcast(m: Move, payloads: list[int]) -> None:
    if m.wire.rank != m.call.root:
        m.wire.copy(m.output.data_ptr(), payloads[m.call.root], m.output.numel() * m.output.element_size())


def _small_all_to_all(m: Move, payloads: list[int]) -> None:
    nbytes = m.input.numel() * m.input.element_size() // m.wire.size
    out, at, copy = m.output.data_ptr(), m.wire.rank * nbytes, m.wire.copy
    for r, payload in enumerate(payloads):
        copy(out + r * nbytes, payload + at, nbytes)


SMALL: dict[str, Small] = {
    "all_reduce": _small_all_reduce,
    "reduce_scatter": _small_reduce_scatter,
    "all_gather": _small_all_gather,
    "broadcast": _small_broadcast,
    "all_to_all": _small_all_to_all,
}


# -- large: straight between the tensors, reductions through staging ---------------------------------


def _scatter_and_sum(m: Move, bounds: list[tuple[int, int]], target: torch.Tensor, gather: bool) -> Steps:
    """Chunk r of every rank's input to rank r, which reduces them into ``target``; then, if ``gather``,
    back from there into everyone's output. Segment by segment, the next one on its way during a sum."""
    wire, rank = m.wire, m.wire.rank
    longest = max(hi - lo for lo, hi in bounds)
    step = max(1, _SEGMENT_BYTES // m.input.element_size())
    cuts = [[(min(lo + s, hi), min(lo + s + step, hi)) for lo, hi in bounds] for s in range(0, longest, step)]
    width = min(step, longest) * m.input.element_size()
    stages = [m.pool.take(max(1, width * len(wire.peers))) for _ in range(min(2, len(cuts)))]
    up, down = wire.tag(m.seq, SCATTER), wire.tag(m.seq, GATHER)

    def post(s: int) -> tuple[Pending, list[torch.Tensor]]:
        lo, hi = cuts[s][rank]
        parts = [m.input[lo:hi]] * wire.size
        pending: Pending = []
        for i, p in enumerate(wire.peers):
            rows = stages[s % 2].data[i * width : i * width + (hi - lo) * m.input.element_size()]
            parts[p] = rows.view(m.input.dtype)
            wire.recv(pending, parts[p], p, up)
        for p in wire.peers:
            wire.send(pending, m.input[slice(*cuts[s][p])], p, up)
        return pending, parts

    back: Pending = []
    ahead = post(0) if cuts else ([], [])
    for s, segment in enumerate(cuts):
        pending, parts = ahead
        yield pending
        if s + 1 < len(cuts):
            ahead = post(s + 1)
        lo, hi = (x - bounds[rank][0] for x in segment[rank])
        yield partial(reduce_ranks, target[lo:hi], parts, m.call.reduce)
        for p in wire.peers if gather else ():
            wire.recv(back, m.output[slice(*segment[p])], p, down)
            wire.send(back, target[lo:hi], p, down)
    yield back
    for stage in stages:
        m.pool.give(stage)


def _large_all_reduce(m: Move) -> Steps:
    bounds = chunk_bounds(m.input.numel(), m.wire.size)
    yield from _scatter_and_sum(m, bounds, m.output[slice(*bounds[m.wire.rank])], gather=True)


def _large_reduce_scatter(m: Move) -> Steps:
    yield from _scatter_and_sum(m, chunk_bounds(m.input.numel(), m.wire.size), m.output, gather=False)


def _large_all_gather(m: Move) -> Steps:
    chunks = m.output.view(m.wire.size, -1)
    pending: Pending = []
    for p in m.wire.peers:
        m.wire.recv(pending, chunks[p], p, m.wire.tag(m.seq, GATHER))
    for p in m.wire.peers:
        m.wire.send(pending, m.input, p, m.wire.tag(m.seq, GATHER))
    yield partial(_copy, chunks[m.wire.rank], m.input)
    yield pending


def _large_broadcast(m: Move) -> Steps:
    """Scatter from the root, then all_gather: the root sends about as many bytes as everyone else."""
    wire, root = m.wire, m.call.root
    bounds = chunk_bounds(m.output.numel(), wire.size)
    up, down = wire.tag(m.seq, SCATTER), wire.tag(m.seq, GATHER)
    chunks = [m.output[lo:hi] for lo, hi in bounds]
    first: Pending = []
    if wire.rank == root:
        for p in wire.peers:
            wire.send(first, chunks[p], p, up)
            wire.send(first, chunks[root], p, down)
    else:
        wire.recv(first, chunks[wire.rank], root, up)
        second: Pending = []
        for p in wire.peers:
            wire.recv(second, chunks[p], p, down)
        yield first
        for p in wire.peers:
            if p != root:
                wire.send(second, chunks[wire.rank], p, down)
        yield second
        return
    yield first


def _large_all_to_all(m: Move) -> Steps:
    sources, targets = m.input.view(m.wire.size, -1), m.output.view(m.wire.size, -1)
    pending: Pending = []
    for p in m.wire.peers:
        m.wire.recv(pending, targets[p], p, m.wire.tag(m.seq, SCATTER))
    for p in m.wire.peers:
        m.wire.send(pending, sources[p], p, m.wire.tag(m.seq, SCATTER))
    yield partial(_copy, targets[m.wire.rank], sources[m.wire.rank])
    yield pending


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


LARGE: dict[str, Large] = {
    "all_reduce": _large_all_reduce,
    "reduce_scatter": _large_reduce_scatter,
    "all_gather": _large_all_gather,
    "broadcast": _large_broadcast,
    "all_to_all": _large_all_to_all,
}
