"""Large collectives of a group over several hosts: inside a host through shared memory, between hosts by messages.

Data is cut into *columns*, as many as the host with the most ranks has ranks. On every host each column has a rank
that carries it between hosts, so that all ranks of a host use the network at once; where a host has fewer ranks than
there are columns, its ranks carry several, one after the other.

A sum in rank order is a fold from the left, so it need not be gathered in one place: a part's running sum travels
along the hosts in the order of their ranks (in fp32 for 16-bit floats), each adds its own ranks' contributions in
order, and the last rounds it and sends it to the others. That gives the same bits as the flat sum (but for the
payload of a NaN in 16 bits). What it costs: of an all_reduce of n bytes a link between hosts carries n for a host
instead of n for a rank, at the price of as many hops in a row as there are hosts; ranks that alternate between
hosts make every rank a hop. all_gather and broadcast send each byte once to each other host. all_to_all is flat:
no byte in it is sent twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
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
    from .wired import WiredGroup

_PART_BYTES = 1 << 20
"""What a column carries at a time."""


class Run(NamedTuple):
    """Ranks that follow each other in the group and share a host."""

    host: int
    ranks: list[int]
    """As indices among the host's ranks."""


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
    """Where a group's ranks are. hosts: the group's ranks by host. inside: the group of this host's ranks."""

    def __init__(self, hosts: Sequence[Sequence[int]], rank: int, inside: WiredGroup) -> None:
        self.hosts = [list(ranks) for ranks in hosts]
        self.inside = inside
        self.turns = Turns()
        place = {r: (h, i) for h, ranks in enumerate(hosts) for i, r in enumerate(ranks)}
        self.rank = rank
        self.host, self.index = place[rank]
        self.width = len(hosts[self.host])
        self.widest = max(map(len, hosts))
        order = [place[r] for r in sorted(place)]
        self.runs = [Run(h, [i for _, i in run]) for h, run in groupby(order, key=lambda at: at[0])]

    def share(self, count: int, host: int) -> int:
        """Columns that a rank of a host carries of ``count``, the last ones perhaps fewer."""
        return -(-count // len(self.hosts[host]))

    def carriers(self, column: int, count: int) -> list[int]:
        """By host: who carries a column of ``count``. Of as many columns as a host has ranks, each rank has its own."""
        return [ranks[column // self.share(count, h)] for h, ranks in enumerate(self.hosts)]

    def mine(self, count: int) -> range:
        """The columns of ``count`` that this rank carries."""
        share = self.share(count, self.host)
        return range(min(self.index * share, count), min((self.index + 1) * share, count))

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
        if self.inside._local is None:  # the only one
            if output.data_ptr() != input.data_ptr():
                output.copy_(input)
            return []
        call = Call(op, input.dtype, input.numel(), "", root)
        return [(self.inside._local.start(call, output, input), self.rank)]

    def close(self) -> None:
        self.inside.close()


def _rows(
    h: Hierarchy, source: torch.Tensor, count: int
) -> Generator[Pending | Callable[[], None], None, torch.Tensor]:
    """Exchange ``count`` columns, cut from ``source``, inside this host.

    Returns ``[share, width, length]``: of each column that this rank carries, the contributions of the host's ranks.
    """
    share, length = h.share(count, h.host), source.numel() // count
    if share * h.width > count:
        source = torch.cat([source, source.new_zeros((share * h.width - count) * length)])
    rows = torch.empty_like(source)
    yield h.local("all_to_all", rows, source)
    return rows.view(h.width, share, length).transpose(0, 1)


def _sum_part(
    h: Hierarchy, m: Move, rows: torch.Tensor, target: torch.Tensor, peers: list[int], to: Sequence[int]
) -> Steps:
    """One column's part: ``rows`` are this host's contributions, ``peers`` the carriers.

    The sum reaches the ranks ``to``, which are carriers, in ``target``; all of it is done when the generator ends.
    """
    wire, up, down = m.wire, m.wire.tag(m.seq, SCATTER), m.wire.tag(m.seq, GATHER)
    half = rows.dtype in (torch.bfloat16, torch.float16)
    wide = rows.float() if half else rows
    acc = torch.empty(target.numel(), dtype=wide.dtype)
    for i, run in enumerate(h.runs):
        if run.host != h.host:
            continue
        parts = [wide[r] for r in run.ranks]
        if i:
            before: Pending = []
            wire.recv(before, acc, peers[h.runs[i - 1].host], up)
            yield before
            parts.insert(0, acc)
        reduce_ranks(acc, parts, _op(m))
        if i + 1 < len(h.runs):
            onward: Pending = []
            wire.send(onward, acc, peers[h.runs[i + 1].host], up)
            yield onward
    last = peers[h.runs[-1].host]
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
    item, columns = m.input.element_size(), h.widest
    whole = m.input.numel() // columns * columns
    step = max(1, _PART_BYTES // item) * columns
    for lo in range(0, whole, step):
        hi = min(lo + step, whole)
        yield from _all_reduce_segment(h, m, m.input[lo:hi], m.output[lo:hi])
    if whole < m.input.numel():  # the few elements that do not divide
        yield from _all_reduce_segment(h, m, m.input[whole:], m.output[whole:])


def _all_reduce_segment(h: Hierarchy, m: Move, source: torch.Tensor, target: torch.Tensor) -> Steps:
    columns = h.widest
    if source.numel() % columns:
        source = torch.cat([source, source.new_zeros(columns - source.numel())])
    rows = yield from _rows(h, source, columns)
    parts = source.new_zeros(rows.shape[0], rows.shape[2])
    for i, column in enumerate(h.mine(columns)):
        peers = h.carriers(column, columns)
        yield from _sum_part(h, m, rows[i], parts[i], peers, peers)
    total = source.new_empty(h.width * parts.numel())
    yield h.local("all_gather", total, parts.view(-1))
    target.copy_(total[: target.numel()])


def _reduce_scatter(h: Hierarchy, m: Move) -> Steps:
    """For one host after the other: the chunks of its ranks are the columns."""
    chunks, chunk = m.input.view(m.wire.size, -1), m.output.numel()
    step = max(1, _PART_BYTES // m.input.element_size())
    result = torch.empty_like(m.output)  # the output may be a chunk of the input
    for host in h.hosts:
        for lo in range(0, chunk, step):
            hi = min(lo + step, chunk)
            rows = yield from _rows(h, torch.cat([chunks[r, lo:hi] for r in host]), len(host))
            for i, column in enumerate(h.mine(len(host))):
                yield from _sum_part(h, m, rows[i], result[lo:hi], h.carriers(column, len(host)), [host[column]])
    m.output.copy_(result)


def _all_gather(h: Hierarchy, m: Move) -> Steps:
    """The inputs of a host's ranks are columns for each other host, whose ranks then share what came."""
    wire, tag = m.wire, m.wire.tag(m.seq, GATHER)
    outputs, step = m.output.view(wire.size, -1), max(1, _PART_BYTES // m.input.element_size())
    own = m.input.clone() if m.input.data_ptr() != outputs[h.rank].data_ptr() else m.input
    shares = [h.share(len(ranks), h.host) for ranks in h.hosts]
    for lo in range(0, own.numel(), step):
        part = own[lo : lo + step]
        came = part.new_zeros(sum(shares), part.numel())
        pending: Pending = []
        for host, ranks in enumerate(h.hosts):
            first = sum(shares[:host])
            if host == h.host:
                came[first].copy_(part)
                continue
            for i, column in enumerate(h.mine(len(ranks))):
                wire.recv(pending, came[first + i], ranks[column], tag)
            wire.send(pending, part, h.carriers(h.index, h.width)[host], tag)
        yield pending
        grid = came.new_empty(h.width, *came.shape)
        yield h.local("all_gather", grid.view(-1), came.view(-1))
        for host, ranks in enumerate(h.hosts):
            for column, r in enumerate(ranks):
                at, i = divmod(column, shares[host])
                outputs[r, lo : lo + step].copy_(grid[at, sum(shares[:host]) + i])


def _broadcast(h: Hierarchy, m: Move) -> Steps:
    """The root sends to one rank of each other host, and every host spreads what came."""
    tag, root = m.wire.tag(m.seq, GATHER), m.call.root
    index = next(ranks.index(root) for ranks in h.hosts if root in ranks)
    doors = [root if root in ranks else ranks[index % len(ranks)] for ranks in h.hosts]
    step = max(1, _PART_BYTES * h.widest // m.input.element_size())
    for lo in range(0, m.output.numel(), step):
        part = m.output[lo : lo + step]
        pending: Pending = []
        if h.rank == root:
            for door in doors:
                if door != root:
                    m.wire.send(pending, part, door, tag)
        elif h.rank in doors:
            m.wire.recv(pending, part, root, tag)
        yield pending
        yield h.local("broadcast", part, part, h.hosts[h.host].index(doors[h.host]))


_MOVES: dict[str, Callable[[Hierarchy, Move], Steps]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
}
