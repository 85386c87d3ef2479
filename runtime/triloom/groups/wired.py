"""Groups over the nonblocking point-to-point of a Wire: checked, asynchronous, sums in rank order.

A collective starts with one message from every rank to every other: a 64-byte header saying what
the rank thinks it is doing, with its input behind it when that is small. A rank goes on only when
all headers agree with its own, so before any buffer changes every rank knows that all of them are
in the same operation, and a wait that is too long knows who had not arrived. Small operations
are complete then; large ones move their data straight between the tensors, sums through staging.

A transfer is symmetric too: the sender's header (with a small payload) and the receiver's header
cross, both check, large data follows. A send is therefore done only when its receive was issued,
for every size: a program never comes to rest on the transport's buffering.

The progress thread drives what is under way while nobody waits (progress.py). Headers are matched in
the order they are sent, data by tags with the sequence number, so operations overtake each other freely.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import DeadlineError, GroupError, MismatchError
from .base import Group, Work
from .checked import CheckedGroup
from .fingerprint import HEADER_BYTES, Call, describe, describe_header, group_id, mismatch_text, pack, rank_list
from .hierarchy import Hierarchy
from .moves import LARGE, SMALL, Move
from .progress import Job, Pending, Progress, Steps
from .shared import SharedLanes, SharedWork, connect
from .shared_host import Host, SharedMemory
from .solo import Solo
from .staging import GpuCopies, GpuStage, HostPool
from .wire import HEADER, INLINE_BYTES, RECV_HEADER, ROW_BYTES, SEND_HEADER, TRANSFER, Slot, Wire


class _Shared(NamedTuple):
    """What a world and all its splits have in common."""

    progress: Progress
    pool: HostPool
    gpus: dict[torch.device, GpuCopies]

    def gpu(self, device: torch.device) -> GpuCopies:
        if device not in self.gpus:
            self.gpus[device] = GpuCopies(device)
        return self.gpus[device]


class WiredGroup(CheckedGroup):
    """The ranks of a Wire, which belongs to this group from now on.

    deadline: default seconds a wait may take. progress_thread: drive operations while nobody
    waits. check: compare fingerprints (off only to measure what that costs: what the wire does with
    operations that do not match is then undefined). shared: how groups whose ranks are all on one host use
    its memory instead of the wire; None: they do not. ``transport`` says what became of it.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        name: str = "world",
        deadline: float = 600.0,
        progress_thread: bool = True,
        check: bool = True,
        shared: SharedMemory | None = SharedMemory(),  # noqa: B008 (frozen)
        _parent: WiredGroup | None = None,
        _members: Sequence[int] | None = None,
    ) -> None:
        self._wire = wire
        self._shared: _Shared = (
            _parent._shared if _parent else _Shared(Progress(threaded=progress_thread), HostPool(), {})
        )
        self._owner = _parent is None
        self._check = check
        self.name = name
        self.rank = self._wire.rank
        self.size = self._wire.size
        self.members = tuple(range(self.size)) if _members is None else tuple(_members)
        self.deadline = deadline
        self._id = group_id(name, self.members)
        self._seq = 0
        self._transfers: dict[tuple[int, bool], int] = {}
        self._slots: list[Slot] = []
        self._failed = ""
        self._closed = False
        self._host: Host | None = _parent._host if _parent else None
        self._local: SharedLanes | None = None
        self._tree: Hierarchy | None = None
        self.transport = ""
        connect(self, shared if _parent is None else None)

    # -- issuing ---------------------------------------------------------------------------------

    def _issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        if self._local is not None:
            return self._local.issue(call, output, input)
        seq = self._seq
        work = WiredWork(self, call, seq, "")
        self._refuse_if_unusable(work)
        self._seq = seq + 1
        header = pack(call, seq, self._id)
        out, inp = self._flat(work, call, output, input, call.op in ("all_reduce", "broadcast"))
        work.long = inp is not None and inp.numel() * inp.element_size() > self._wire.inline_bytes
        work.steps = self._collective(work, header, out, inp)
        self._shared.progress.start(work)
        if call.refused:
            raise MismatchError(f"{work.text()} on group {self.name!r}, rank {self.rank}: {call.refused}")
        return work

    def _transfer(self, call: Call, tensor: torch.Tensor, peer: int, *, sending: bool) -> Work:
        if self._local is not None:
            return self._local.transfer(call, tensor, peer, sending)
        seq = self._transfers.get((peer, sending), 0)
        work = WiredWork(self, call, seq, f"send to rank {peer}" if sending else f"recv from rank {peer}")
        self._refuse_if_unusable(work)
        self._transfers[peer, sending] = seq + 1
        header = pack(call, seq, self._id)
        out, inp = self._flat(work, call, None if sending else tensor, tensor if sending else None, False)
        work.long = tensor.numel() * tensor.element_size() > INLINE_BYTES
        if sending:
            work.steps = self._send_steps(work, header, inp, peer)
        else:
            work.steps = self._recv_steps(work, header, out, peer)
        self._shared.progress.start(work)
        if call.refused:
            raise MismatchError(f"{work.text()} on group {self.name!r}, rank {self.rank}: {call.refused}")
        return work

    def _refuse_if_unusable(self, work: WiredWork | SharedWork) -> None:
        if self._closed:
            raise GroupError(f"rank {self.rank}: {work.text()} on group {self.name!r}: the group is closed")
        if self._failed:
            raise GroupError(
                f"rank {self.rank}: {work.text()} on group {self.name!r}: an earlier operation failed: {self._failed}"
            )

    def _flat(
        self,
        work: WiredWork | SharedWork,
        call: Call,
        output: torch.Tensor | None,
        input: torch.Tensor | None,
        in_place: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Flat host tensors of an operation; GPU tensors get pinned counterparts, recorded in ``work.stage``."""
        any_tensor = output if output is not None else input
        if any_tensor is None or call.refused:
            return None, None
        out = None if output is None else output.data.view(-1)
        inp = out if in_place else None if input is None else input.data.view(-1)
        if not any_tensor.is_cuda:
            return out, inp
        work.stage = self._shared.gpu(any_tensor.device).stage(out, inp, in_place)
        if any_tensor.numel() * any_tensor.element_size() <= max(INLINE_BYTES, self._wire.inline_bytes * self.size):
            work.stage.ready.synchronize()  # may travel with the header, which must leave in order
        return work.stage.host_out, work.stage.host_in

    # -- collectives -----------------------------------------------------------------------------

    def _collective(
        self, work: WiredWork, header: bytes, output: torch.Tensor | None, input: torch.Tensor | None
    ) -> Steps:
        call = work.call
        nbytes = 0 if input is None else input.numel() * input.element_size()
        small = nbytes <= self._wire.inline_bytes
        sends: Pending = []
        slot = None
        turn = -1 if self._tree is None else self._tree.turns.take()
        if small or self._check:
            slot = self._slots.pop() if self._slots else Slot(self._wire)
            carries = small and call.root in (-1, self.rank)  # of a broadcast, only the root's
            sends = slot.post(header, 0 if input is None else input.data_ptr(), nbytes if carries else 0)
            yield slot.receives.copy()
            if self._check and not self._agreed(work, slot, header):
                self._end_turn(turn)
                yield sends
                self._slots.append(slot)
                return
        if output is not None and input is not None and output.numel():
            move = Move(call, work.seq, output, input, self._wire, self._shared.pool)
            if small and slot is not None:
                SMALL[call.op](move, slot.payloads)
            else:
                work.phase = "data"
                if work.stage is not None:
                    yield [(work.stage, self.rank)]
                yield from LARGE[call.op](move) if self._tree is None else self._tree.steps(move, turn)
        self._end_turn(turn)
        work.finish()
        yield sends
        if slot is not None:
            self._slots.append(slot)

    def _end_turn(self, turn: int) -> None:
        if self._tree is not None:
            self._tree.turns.end(turn)

    def _agreed(self, work: WiredWork, slot: Slot, header: bytes) -> bool:
        """Compare every rank's header with the own one; a difference ends the work with MismatchError."""
        others = [bytes(row[:HEADER_BYTES]) for row in slot.rows]
        if all(other == header for other in others) and not work.call.refused:
            return True
        said = {r: describe_header(other) for r, other in enumerate(others)}
        work.finish(MismatchError(mismatch_text(self.name, said, self.members)))
        return False

    # -- transfers -------------------------------------------------------------------------------

    def _send_steps(self, work: WiredWork, header: bytes, tensor: torch.Tensor | None, peer: int) -> Steps:
        wire = self._wire
        buffer = self._shared.pool.take(ROW_BYTES + HEADER_BYTES)
        base = buffer.data.data_ptr()
        mine, theirs = wire.memory(base, ROW_BYTES), wire.memory(base + ROW_BYTES, HEADER_BYTES)
        nbytes = 0 if tensor is None else tensor.numel() * tensor.element_size()
        small = nbytes <= INLINE_BYTES
        mine[:HEADER_BYTES] = header
        if small and nbytes and tensor is not None:
            mine[HEADER_BYTES : HEADER_BYTES + nbytes] = wire.memory(tensor.data_ptr(), nbytes)
        answer = wire.irecv(base + ROW_BYTES, HEADER_BYTES, peer, RECV_HEADER)
        sent = [(wire.isend(base, HEADER_BYTES + (nbytes if small else 0), peer, SEND_HEADER), peer)]
        yield [(answer, peer)]
        if self._same(work, bytes(theirs), header, peer) and not small and tensor is not None:
            work.phase = "data"
            if work.stage is not None:
                yield [(work.stage, self.rank)]
            pending: Pending = []
            wire.send(pending, tensor, peer, wire.tag(work.seq, TRANSFER))
            yield pending
        work.finish(work.error)
        yield sent
        self._shared.pool.give(buffer)

    def _recv_steps(self, work: WiredWork, header: bytes, tensor: torch.Tensor | None, peer: int) -> Steps:
        wire = self._wire
        buffer = self._shared.pool.take(ROW_BYTES + HEADER_BYTES)
        base = buffer.data.data_ptr()
        theirs, mine = wire.memory(base, ROW_BYTES), wire.memory(base + ROW_BYTES, HEADER_BYTES)
        mine[:] = header
        theirs_in = wire.irecv(base, ROW_BYTES, peer, SEND_HEADER)
        sent = [(wire.isend(base + ROW_BYTES, HEADER_BYTES, peer, RECV_HEADER), peer)]
        yield [(theirs_in, peer)]
        if self._same(work, bytes(theirs[:HEADER_BYTES]), header, peer) and tensor is not None and tensor.numel():
            nbytes = tensor.numel() * tensor.element_size()
            if nbytes <= INLINE_BYTES:
                wire.memory(tensor.data_ptr(), nbytes)[:] = theirs[HEADER_BYTES : HEADER_BYTES + nbytes]
            else:
                work.phase = "data"
                pending: Pending = []
                wire.recv(pending, tensor, peer, wire.tag(work.seq, TRANSFER))
                yield pending
        work.finish(work.error)
        yield sent
        self._shared.pool.give(buffer)

    def _same(self, work: WiredWork, theirs: bytes, mine: bytes, peer: int) -> bool:
        """Compare the two ends' headers; a difference is recorded in ``work.error``."""
        if not self._check or (theirs == mine and not work.call.refused):
            return True
        sending = work.what.startswith("send")
        ends = {peer: f"{'recv from' if sending else 'send to'} rank {self.rank}", self.rank: work.what}
        said = {r: f"{ends[r]}: {describe_header(h)}" for r, h in ((peer, theirs), (self.rank, mine))}
        work.error = MismatchError(mismatch_text(self.name, said, self.members))
        return False

    # -- lifetime --------------------------------------------------------------------------------

    def _subgroup(self, parts: Sequence[Sequence[int]], name: str) -> Group:
        color = next((i for i, part in enumerate(parts) if self.rank in part), None)
        key = 0 if color is None else list(parts[color]).index(self.rank)
        with self._shared.progress.lock:  # everyone has agreed to be here
            wire = self._wire.split(color, key)
        if color is None or wire is None:
            return Solo(self.members[self.rank], name)
        members = [self.members[r] for r in parts[color]]
        return WiredGroup(
            wire,
            name=name,
            deadline=self.deadline,
            check=self._check,
            progress_thread=False,
            _parent=self,
            _members=members,
        )

    def close(self) -> None:
        """Free the wire, and for the world stop the progress thread. Outstanding work is abandoned.

        With work outstanding the wire is not freed, as that is collective, and memory that the
        transport may still touch is never freed.
        """
        if self._closed:
            return
        self._closed = True
        if self._local is not None:
            self._local.close()
        if self._tree is not None:
            self._tree.close()
        progress = self._shared.progress
        if self._owner:
            progress.stop()
        with progress.lock:
            left = progress.outstanding(lambda job: isinstance(job, WiredWork) and job.group is self)
            progress.drop(left)
            if left or self._failed:
                for thing in (*left, self):
                    _keep_for_ever(thing)
            else:
                for slot in self._slots:
                    slot.free()
                self._wire.close()
            for work in left:
                if isinstance(work, WiredWork) and not work.over:
                    work.finish(GroupError(f"{work.text()} on group {self.name!r} was abandoned: the group was closed"))


def _keep_for_ever(thing: object) -> None:
    """The transport still has the addresses of this object's buffers and cannot be asked to forget a send."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


class WiredWork(Job, Work):
    """One operation of a WiredGroup. ``what`` names the direction of a transfer."""

    __slots__ = ("call", "group", "phase", "seq", "stage", "what")

    def __init__(self, group: WiredGroup, call: Call, seq: int, what: str) -> None:
        super().__init__()
        self.group = group
        self.call = call
        self.seq = seq
        self.what = what
        self.phase = "headers"
        self.stage: GpuStage | None = None

    def text(self) -> str:
        words = describe(self.call, self.seq)
        return f"{self.what}: {words}" if self.what else words

    def finish(self, error: BaseException | None = None) -> None:
        """The result is in the tensors, or the operation failed; called from its steps."""
        if self.stage is not None:
            if error is None:
                self.stage.copy_back()
            self.stage.release()
        self.error = error
        self.over = True

    def done(self) -> bool:
        if not self.over:
            self.group._shared.progress.poll(self)
            if not self.over:
                self._refuse_if_failed()
                return False
        if self.error is not None:
            raise self.error
        return self.stage is None or self.stage.arrived()

    def wait(self, deadline: float | None = None) -> None:
        if not self.over:
            group = self.group
            self._refuse_if_failed()
            seconds = group.deadline if deadline is None else deadline
            if not group._shared.progress.spin(self, seconds):
                raise self._late(seconds)
        if self.error is not None:
            raise self.error
        if self.stage is not None:
            self.stage.order()

    def _refuse_if_failed(self) -> None:
        if self.group._failed:
            self.group._refuse_if_unusable(self)

    def _late(self, seconds: float) -> DeadlineError:
        group = self.group
        with group._shared.progress.lock:
            late = sorted({peer for request, peer in self.pending if not request.Test()})
            instead = [
                f"rank {peer} is at {_DIRECTION[tag].format(group.rank)}{describe_header(header)}"
                for peer in late
                for tag, header in group._wire.unexpected(peer)
            ]
        who = rank_list(late, group.members) if late else "the local sum"
        state = (
            f"{who} had not arrived"
            if self.phase == "headers"
            else f"all ranks had arrived, but the data of {who} had not"
        )
        here = f"rank {group.rank}: {self.text()} on group {group.name!r}"
        text = "; ".join([f"{here}: after {seconds:g} s {state}", *instead])
        group._failed = group._failed or text
        return DeadlineError(text)


_DIRECTION = {HEADER: "", SEND_HEADER: "send to rank {}: ", RECV_HEADER: "recv from rank {}: "}
