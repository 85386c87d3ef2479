"""Large collectives of a group over several hosts: inside a host through shared memory, between hosts by messages.

The ranks with the same place on their hosts form a *column*; each column carries an equal part of the data
between hosts, so that all ranks of a host use the network at once.

A sum in rank order is a fold from the left, so it need not be gathered in one place: a part's running sum travels
along the hosts in the order of their ranks (in fp32 for 16-bit floats), each adds its own ranks' contributions in
order, and the last rounds it and sends it to the others. That gives the same bits as the flat sum (but for the
payload of a NaN in 16 bits). What it costs: of an all_reduce of n bytes a link between hosts carries n for a host
instead of n for a rank, at the price of as many hops in a row as there are hosts; ranks that alternate between
hosts make every rank a hop. all_gather and broadcast send each byte once to each other host. all_to_all is flat:
no byte in it is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..native import reduce_ranks
from .base import ReduceOp
from .fingerprint import Call
from .moves import LARGE, Move
from .progress import Pending, Steps
from .wire import GATHER, SCATTER

if TYPE_CHECKING:
    from .shared import SharedLanes

_PART_BYTES = 1 << 20
"""What a column carries at a time."""


class Run(NamedTuple):
    """Ranks that follow each other in the group and share a host."""

    host: int
    columns: list[int]


class Turns:
    """Operations use the local segment in the order of issue, though they may come to it in any order."""

    def __init__(self) -> None:
        self._issued = 0
        self._now = 0
        self._over: set[int] = set()

    def take(self) -> int:
        self._issued += 1
        return self._issued - 1

    def end(self, turn: int) -> None:
        self._over.add(turn)
        while self._now in self._over:
            self._over.remove(self._now)
            self._now += 1

    def is_now(self, turn: int) -> bool:
        return self._now == turn


class Turn(NamedTuple):
    """Polled beside MPI requests."""

    turns: Turns
    turn: int

    def Test(self) -> bool:
        return self.turns.is_now(self.turn)


class Hierarchy:
    """Where a group's ranks are. ``hosts``: the group's ranks by host, as many on each."""

    def __init__(self, hosts: Sequence[Sequence[int]], rank: int, lanes: SharedLanes) -> None:
        self.hosts = [list(ranks) for ranks in hosts]
        self.lanes = lanes
        self.turns = Turns()
        place = {r: (h, c) for h, ranks in enumerate(hosts) for c, r in enumerate(ranks)}
        self.rank = rank
        self.host, self.column = place[rank]
        self.width = len(hosts[0])
        order = [place[r] for r in sorted(place)]
        self.runs = [Run(h, [c for _, c in run]) for h, run in groupby(order, key=lambda at: at[0])]
        self.peers = [ranks[self.column] for ranks in self.hosts]
        """This rank's column."""

    def steps(self, m: Move, turn: int) -> Steps:
        """Move a large operation's data; ``turn`` was taken when it was issued."""
        move = _MOVES.get(m.call.op)
        if move is None:
            yield from LARGE[m.call.op](m)
        else:
            yield [(Turn(self.turns, turn), self.rank)]
            yield from move(self, m)

    def local(self, op: str, output: torch.Tensor, input: torch.Tensor, root: int = -1) -> Pending:
        """Start an operation among the ranks of this host."""
        call = Call(op, input.dtype, input.numel(), "", root)
        return [(self.lanes.start(call, output, input), self.rank)]


def _sum_part(h: Hierarchy, m: Move, rows: torch.Tensor, target: torch.Tensor, to: Sequence[int]) -> Steps:
    """The column's part: ``rows`` are this host's contributions. The sum reaches the ranks ``to`` in ``target``.

    Everything about it is done when the generator ends; it leaves the sum in ``target`` only on ranks of ``to``.
    """
    wire, up, down = m.wire, m.wire.tag(m.seq, SCATTER), m.wire.tag(m.seq, GATHER)
    half = rows.dtype in (torch.bfloat16, torch.float16)
    wide = rows.float() if half else rows
    acc = torch.empty(target.numel(), dtype=wide.dtype)
    for i, run in enumerate(h.runs):
        if run.host != h.host:
            continue
        parts = [wide[c] for c in run.columns]
        if i:
            before: Pending = []
            wire.recv(before, acc, h.peers[h.runs[i - 1].host], up)
            yield before
            parts.insert(0, acc)
        reduce_ranks(acc, parts, _op(m))
        if i + 1 < len(h.runs):
            onward: Pending = []
            wire.send(onward, acc, h.peers[h.runs[i + 1].host], up)
            yield onward
    last = h.peers[h.runs[-1].host]
    moved: Pending = []
    if h.rank == last:
        result = acc.to(rows.dtype) if half else acc
        for r in to:
            if r == h.rank:
                target.copy_(result)
            else:
                wire.send(moved, result, r, down)
    elif h.rank in to:
        wire.recv(moved, target, last, down)
    yield moved


def _op(m: Move) -> ReduceOp:
    return m.call.reduce  # type: ignore[return-value]


def _all_reduce(h: Hierarchy, m: Move) -> Steps:
    item, width = m.input.element_size(), h.width
    whole = m.input.numel() // width * width
    step = max(1, _PART_BYTES // item) * width
    for lo in range(0, m.input.numel(), step):
        hi = min(lo + step, whole) if lo < whole else m.input.numel()
        yield from _all_reduce_segment(h, m, m.input[lo:hi], m.output[lo:hi])
        if hi == whole != m.input.numel():  # the few elements that do not divide
            yield from _all_reduce_segment(h, m, m.input[whole:], m.output[whole:])
            return


def _all_reduce_segment(h: Hierarchy, m: Move, source: torch.Tensor, target: torch.Tensor) -> Steps:
    short = h.width - source.numel()
    if source.numel() % h.width:
        source = torch.cat([source, source.new_zeros(short)])
    rows, total = torch.empty_like(source), torch.empty_like(source)
    yield h.local("all_to_all", rows, source)
    part = torch.empty(source.numel() // h.width, dtype=source.dtype)
    yield from _sum_part(h, m, rows.view(h.width, -1), part, h.peers)
    yield h.local("all_gather", total, part)
    target.copy_(total[: target.numel()])


def _reduce_scatter(h: Hierarchy, m: Move) -> Steps:
    """Column c sums, one after the other, the chunks of its ranks on each host."""
    chunks, chunk = m.input.view(m.wire.size, -1), m.output.numel()
    step = max(1, _PART_BYTES // m.input.element_size())
    result = torch.empty_like(m.output)  # the output may be a chunk of the input
    for host in h.hosts:
        for lo in range(0, chunk, step):
            hi = min(lo + step, chunk)
            source = torch.cat([chunks[r, lo:hi] for r in host])
            rows = torch.empty_like(source)
            yield h.local("all_to_all", rows, source)
            yield from _sum_part(h, m, rows.view(h.width, -1), result[lo:hi], [host[h.column]])
    m.output.copy_(result)


def _all_gather(h: Hierarchy, m: Move) -> Steps:
    wire, tag = m.wire, m.wire.tag(m.seq, GATHER)
    outputs, step = m.output.view(wire.size, -1), max(1, _PART_BYTES // m.input.element_size())
    own = m.input.clone() if m.input.data_ptr() != outputs[h.rank].data_ptr() else m.input
    for lo in range(0, own.numel(), step):
        part = own[lo : lo + step]
        column = torch.empty(len(h.hosts), part.numel(), dtype=part.dtype)
        column[h.host].copy_(part)
        pending: Pending = []
        for host, peer in enumerate(h.peers):
            if peer != h.rank:
                wire.recv(pending, column[host], peer, tag)
                wire.send(pending, part, peer, tag)
        yield pending
        grid = torch.empty(h.width, *column.shape, dtype=part.dtype)
        yield h.local("all_gather", grid.view(-1), column.view(-1))
        for host, ranks in enumerate(h.hosts):
            for c, r in enumerate(ranks):
                outputs[r, lo : lo + step].copy_(grid[c, host])


def _broadcast(h: Hierarchy, m: Move) -> Steps:
    """The root sends to its column, and every host spreads what came."""
    tag, root = m.wire.tag(m.seq, GATHER), m.call.root
    column = next(ranks.index(root) for ranks in h.hosts if root in ranks)
    step = max(1, _PART_BYTES * h.width // m.input.element_size())
    for lo in range(0, m.output.numel(), step):
        part = m.output[lo : lo + step]
        pending: Pending = []
        if h.rank == root:
            for peer in h.peers:
                if peer != root:
                    m.wire.send(pending, part, peer, tag)
        elif h.column == column:
            m.wire.recv(pending, part, root, tag)
        yield pending
        yield h.local("broadcast", part, part, column)


_MOVES: dict[str, Callable[[Hierarchy, Move], Steps]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
}
