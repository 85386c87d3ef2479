"""A Group over NCCL: operations on the tensors of one GPU, on a stream of the group's own.

An operation is queued behind what the caller had queued on the current stream, and
``Work.wait`` makes the current stream wait for it: the host never does (``Work.synchronize`` is for
the host that must). Operations of one group run in the order they were issued (lanes "fifo"); a
send that must cross a receive goes into ``batch``, or uses one group per direction (links.py).

Failures. A deadline counts from the issue of an operation; its watchdog then aborts the
communicator, and the next use of the group, or of its work, raises DeadlineError naming operation,
sequence number and the ranks that had not come. Errors that NCCL finds by itself end the group the
same way. A call whose own arguments do not fit raises on its own rank only, at once. Whether all
ranks issued the same operations is compared by ``check``, once a step.

CUDA graphs. Operations may be issued while the current stream is being captured, if they are waited
for before the capture ends; they are then part of the graph, and neither the deadline nor the
watchdog knows their replays. Work begun before a capture must be waited for before it. Issue each
operation once before capturing (``warm``), and register buffers then too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from ..errors import DeadlineError, GroupError, MismatchError
from .arrays import as_tensor
from .base import Group, ReduceOp, Transfer, Work
from .checked import CheckedGroup
from .fingerprint import Call, describe, group_id, rank_list
from .nccl_comm import IN_PROGRESS, NO_COLOR, Communicator
from .nccl_moves import MOVES, REDUCTIONS, Move, Piece, Sums, Temporaries, choose, transfers
from .nccl_sequence import Sequence as Issued
from .nccl_streams import Streams
from .nccl_watchdog import Board, Row, Watchdog
from .nccl_work import BarrierWork, NCCLWork
from .solo import Solo


class NCCLGroup(CheckedGroup):
    """The ranks of a NCCL communicator; made by :func:`triloom.groups.nccl_world.nccl_group` and ``split``.

    control: a host group over the same ranks, for what must be agreed upon. sums: how 16-bit floats are
    summed (nccl_moves.Sums: ``upcast`` unless told otherwise). exact: sums, max and min of all floats go
    in rank order and give the bits of the host groups, whatever the communicator, at the cost of
    all_to_all and a local sum.

    Tensors are on the group's device; host values travel over ``control``.
    """

    lanes = "fifo"

    def __init__(
        self,
        comm: Communicator,
        streams: Streams,
        control: Group,
        watchdog: Watchdog,
        *,
        name: str,
        sums: Sums = "upcast",
        exact: bool = False,
        lineage: str = "",
    ) -> None:
        self._is_split = bool(lineage)
        self.comm, self.streams, self.control, self.watchdog = comm, streams, control, watchdog
        self.name, self.rank, self.size, self.members = name, control.rank, control.size, control.members
        self.deadline = control.deadline
        self.sums, self.exact = sums, exact
        self._lineage = f"{lineage}/{name}"
        self._splits = 0
        self.issued = Issued(name, self.members, group_id(self._lineage, self.members))
        self._outstanding: deque[NCCLWork] = deque()
        self._lock = threading.Lock()
        self._failure: tuple[str, NCCLWork | None] | None = None
        """Why the group takes nothing more, and the work it is the error of."""
        self._closed = False
        with streams.scope():
            self._token = torch.zeros(1, dtype=torch.int64, device=streams.device)
        watchdog.add(self)

    # -- issuing ---------------------------------------------------------------------------------

    def _issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        output, input = (self._token, self._token) if output is None or input is None else (output, input)
        self._refuse(call, output)
        seq = self.issued.collective(call)
        out, inp = output.data.view(-1), input.data.view(-1)
        kind = BarrierWork if call.op == "barrier" else NCCLWork
        work = kind(self, describe(call, seq), lambda board: self._not_at(board, seq), self.streams.capturing())

        def body() -> Temporaries:
            if not inp.numel():
                return ()
            reduce: ReduceOp = call.reduce or "sum"  # type: ignore[assignment]
            op = "all_reduce" if call.op == "barrier" else call.op
            move = Move(
                self.comm, self.streams, self.rank, self.size, self.deadline, work.text, out, inp, reduce, call.root
            )
            way = MOVES.get(op) or REDUCTIONS[op, choose(inp.dtype, reduce, self.size, self.sums, self.exact)]
            return way(move)

        return self._post(work, body, (out, inp))

    def _transfer(self, call: Call, tensor: torch.Tensor, peer: int, *, sending: bool) -> Work:
        return self._transfers([(call, Piece("send" if sending else "recv", tensor, peer))])

    def batch(self, transfers: Sequence[Transfer]) -> Work:
        """As Group.batch, as one operation: sends and receives progress together, which single ones do not."""
        pieces = [Piece(t.kind, as_tensor(t.tensor), t.peer) for t in transfers]
        return self._transfers([(self._transfer_call(p.tensor, p.peer), p) for p in pieces])

    def _transfers(self, batch: Sequence[tuple[Call, Piece]]) -> Work:
        for call, t in batch:
            self._refuse(call, t.tensor)
        texts, peers = [], []
        for call, t in batch:
            sending = t.kind == "send"
            seq = self.issued.transfer(call, t.peer, sending=sending)
            texts.append(f"{'send to' if sending else 'recv from'} rank {t.peer}: {describe(call, seq)}")
            peers.append(t.peer)
        upto = self.issued.transfers
        flat = [Piece(t.kind, t.tensor.data.view(-1), t.peer) for _, t in batch if t.tensor.numel()]
        work = NCCLWork(
            self,
            ", ".join(texts) or "empty batch",
            lambda board: self._not_sent(board, upto, peers),
            self.streams.capturing(),
        )

        def body() -> Temporaries:
            if flat:
                stream = self.streams.address
                self.comm.issue(lambda c: transfers(self.comm, c, stream, flat), self.deadline, work.text)
            return ()

        return self._post(work, body, tuple(t.tensor for t in flat))

    def _post(self, work: NCCLWork, body: Callable[[], Temporaries], tensors: tuple[torch.Tensor, ...]) -> Work:
        self.streams.enter()
        try:
            temporaries = body()
        except GroupError as error:
            self.fail(f"{work.place()}: {error}", None)
            self.raise_if_failed(work)
            raise
        work.issued(self.streams.mark(), (*tensors, *temporaries))
        if not work.captured:
            with self._lock:
                self._outstanding.append(work)
        return work

    def _refuse(self, call: Call, tensor: torch.Tensor) -> None:
        """Raise if the call cannot be issued; the other ranks will miss it."""
        words = f"rank {self.rank}: {describe(call, self.issued.collectives)} on group {self.name!r}"
        if self._closed:
            raise GroupError(f"{words}: the group is closed")
        if self._failure is not None:
            raise GroupError(f"{words}: an earlier operation failed: {self._failure[0]}")
        if call.refused:
            raise MismatchError(f"{words}: {call.refused}")
        if tensor.device != self.streams.device:
            raise MismatchError(
                f"{words}: the tensor is on {tensor.device}, this group works on {self.streams.device}; "
                "host tensors go over its control group"
            )

    # -- failing ---------------------------------------------------------------------------------

    def fail(self, why: str, work: NCCLWork | None) -> None:
        """Abort the communicator; ``work`` is the operation whose deadline passed. The first reason stays."""
        with self._lock:
            if self._failure is not None or self._closed:
                return
            self._failure = (why, work)
        self.comm.abort(why)

    def raise_if_failed(self, work: NCCLWork) -> None:
        if self._failure is None:
            return
        why, culprit = self._failure
        if culprit is work:
            raise DeadlineError(why)
        raise GroupError(why if why.startswith(work.place()) else f"{work.place()}: an earlier operation failed: {why}")

    def row(self) -> Row:
        return Row(self.issued.id, self.issued.collectives, self.issued.transfers, int(self._failure is not None))

    def overdue(self, now: float) -> bool:
        with self._lock:
            if self._failure is not None or self._closed:
                return False
            while self._outstanding and self._outstanding[0].reached():
                self._outstanding.popleft().keep = ()
            late = any(now > work.due for work in self._outstanding)
        trouble = self._trouble()
        if trouble:
            with self._lock:
                at = self._outstanding[0].text if self._outstanding else "nothing under way"
            self.fail(f"rank {self.rank}: group {self.name!r} at {at}: {trouble}", None)
        return late and not trouble

    def _trouble(self) -> str:
        """The error that NCCL has found by itself; empty if none."""
        try:
            state = self.comm.state()
            return "" if state in (0, IN_PROGRESS) else self.comm.state_text(state)
        except GroupError as error:  # NCCL cannot even say
            return str(error)

    def give_up(self, board: Board | None, silence: str) -> None:
        with self._lock:
            works = list(self._outstanding)
        now = time.monotonic()
        late = next((work for work in works if now > work.due), None)
        if late is not None:
            self._end(works[0], late, f"after {late.seconds:g} s", board, silence)

    def follow(self, board: Board) -> None:
        rows = [board.said(member, self.issued.id) for member in self.members]
        givers = [r for r, row in enumerate(rows) if row is not None and row.given_up and r != self.rank]
        with self._lock:
            head = self._outstanding[0] if self._outstanding else None
        if givers and head is not None:
            self._end(head, head, "another rank gave up the group, and", board, "")
        elif givers:
            self.fail(f"{rank_list(givers[:1], self.members)} gave up the group waiting for rank {self.rank}", None)

    def _end(self, head: NCCLWork, late: NCCLWork, when: str, board: Board | None, silence: str) -> None:
        """Abort; ``head`` holds up the lane, ``late`` is the operation whose error this is."""
        behind = "" if late is head else f" (queued behind {head.text})"
        absent = [] if board is None else head.late_ranks(board)
        who = silence or "all ranks had arrived: a device or a connection is stuck"
        if absent:
            who = f"{rank_list(absent, self.members)} had not arrived"
        self.fail(f"{late.place()}{behind}: {when} {who}; the communicator was aborted", late)

    def _not_at(self, board: Board, seq: int) -> list[int]:
        rows = [board.said(m, self.issued.id) for m in self.members]
        return [r for r, row in enumerate(rows) if r != self.rank and (row is None or row.collectives <= seq)]

    def _not_sent(self, board: Board, upto: int, peers: Sequence[int]) -> list[int]:
        """Between two ranks the counts tell; among more, a transfer's partner is all that is known."""
        rows = {peer: board.said(self.members[peer], self.issued.id) for peer in sorted(set(peers))}
        if self.size > 2:
            return list(rows)
        return [peer for peer, row in rows.items() if row is None or row.transfers < upto]

    # -- all ranks together ----------------------------------------------------------------------

    def check(self) -> None:
        """Collective, between operations: raise unless all ranks have issued the same operations so far."""
        if self._failure is not None:
            raise GroupError(f"group {self.name!r}: an earlier operation failed: {self._failure[0]}")
        self.issued.check(self.control)

    def warm(self, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Make NCCL's connections now, on every rank: for collectives, or for the (sender, receiver) ``pairs``."""
        small = torch.zeros(self.size, device=self.streams.device)
        works: list[Work] = []
        for sender, receiver in pairs or ():
            if self.rank in (sender, receiver):
                sending = self.rank == sender
                works.append(self.send(small, receiver) if sending else self.recv(small, sender))
        if pairs is None:
            works += [
                self.all_reduce(small),
                self.reduce_scatter(small[:1].clone(), small),
                self.all_gather(small, small[:1].clone()),
                self.broadcast(small),
                self.all_to_all(torch.empty_like(small), small),
            ]
        for work in works:
            if isinstance(work, NCCLWork):
                work.synchronize()

    def _talk(self) -> Group:
        return self.control

    def _subgroup(self, parts: Sequence[Sequence[int]], name: str) -> Group:
        self._splits += 1
        color = next((i for i, part in enumerate(parts) if self.rank in part), None)
        alone = color is None or len(parts[color]) == 1
        control = self.control.split([part for part in parts if len(part) > 1], name)
        key = 0 if color is None else list(parts[color]).index(self.rank)
        comm = self.comm.split(
            NO_COLOR if alone or color is None else color, key, what=f"NCCL group {name!r}", deadline=self.deadline
        )
        if comm is None:
            return Solo(self.members[self.rank], name)
        return NCCLGroup(
            comm,
            self.streams.fork(),
            control,
            self.watchdog,
            name=name,
            sums=self.sums,
            exact=self.exact,
            lineage=f"{self._lineage}#{self._splits}",
        )

    def close(self) -> None:
        """Release the communicator, and the control group of a split; with work outstanding it is aborted.

        The first group also ends its watchdog, which waits a moment for the other ranks to close theirs.
        """
        if self._closed:
            return
        with self._lock:
            idle = all(work.reached() for work in self._outstanding) and self._failure is None
            self._closed = True
        self.watchdog.remove(self)
        if idle:
            self.comm.finish(self.deadline)
        else:
            self.comm.abort(f"group {self.name!r} was closed with work outstanding")
        if self._is_split:
            self.control.close()
        else:
            self.watchdog.stop()
