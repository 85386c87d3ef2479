"""Groups whose ranks share a host: every operation goes through memory that they share.

Fingerprints, deadlines, errors and the order of sums are those of any group; what moves and waits is in
csrc/shm.h. Headers travel in the segment, so all operations of such a group do, whatever their size.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from .. import _C
from ..errors import DeadlineError, GroupError, MismatchError
from ..native import DTYPE_CODES, REDUCE_CODES
from .base import Work
from .fingerprint import HEADER_BYTES, OPS, Call, describe, describe_header, mismatch_text, pack, rank_list
from .hierarchy import Hierarchy
from .objects import gather_objects
from .progress import Job, Steps
from .shared_host import Host, SharedMemory, find_host
from .staging import GpuStage

if TYPE_CHECKING:
    from .wired import WiredGroup

_HEADER = 56
"""Bytes of a header in the segment; the rest of a packed one is padding."""
_VERBS = {op: i for i, op in enumerate(OPS)}
_SLICE = 0.25
"""Seconds of a wait after which Python looks at its signals."""
_LOOK = 0.2
"""Seconds between two looks at the wire."""
_SWEEP = 64
_OVER, _ENDED = 1, 2
_MISMATCH = 4
_KINDS = {0: "", 1: "send to rank {}: ", 2: "recv from rank {}: "}


def connect(group: WiredGroup, options: SharedMemory | None) -> None:
    """Give a group its segment, if its ranks share a host; ``group.transport`` tells. Collective over the group.

    options: of a world's group, whose splits go by its Host; None without sharing, and for splits.
    """
    group.transport = "messages"
    if group.size == 1 or (group._host is None and options is None):
        return
    if group._host is None and options is not None:
        group._host = find_host(group, options)
    assert group._host is not None
    channel, reason = group._host.channel(group)
    if channel is None:
        group.transport = f"messages ({reason})"
        group._tree = connect_hosts(group, group._host)
        if group._tree is not None:
            group.transport = "messages between hosts, shared memory inside"
    else:
        group._local = SharedLanes(group, group._host, channel)
        group.transport = "shared memory"
    group._seq = 0  # what was said so far was not the program's


def connect_hosts(group: WiredGroup, host: Host) -> Hierarchy | None:
    """For a group on several hosts, of which one at least has several of its ranks. Collective over the group."""
    from .wired import WiredGroup

    by_place: dict[int, list[int]] = {}
    for r, member in enumerate(group.members):
        by_place.setdefault(host.places[member], []).append(r)
    hosts = list(by_place.values())
    if len(hosts) in (1, group.size):
        return None
    here = next(i for i, ranks in enumerate(hosts) if group.rank in ranks)
    with group._shared.progress.lock:  # everyone has agreed to be here
        wire = group._wire.split(here, group.rank)
    assert wire is not None
    inside = WiredGroup(
        wire, name=f"{group.name} on host {here}", deadline=group.deadline, check=group._check, progress_thread=False,
        _parent=group, _members=[group.members[r] for r in hosts[here]],
    )  # fmt: skip
    if not all(gather_objects(group, inside._local is not None or inside.size == 1)):
        inside.close()
        return None
    return Hierarchy(hosts, group.rank, inside)


class SharedLanes:
    """The operations of one group through its segment."""

    def __init__(self, group: WiredGroup, host: Host, channel: _C.ShmChannel) -> None:
        assert host.engine is not None
        self.group = group
        self.host = host
        self.engine = host.engine
        self.channel = channel
        self.closed = False
        self._seq = 0
        self._transfers: dict[tuple[int, bool], int] = {}
        self._live: dict[int, SharedWork] = {}
        self._look_at = 0.0

    def issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        """A collective; see CheckedGroup."""
        work = SharedWork(self, call, self._seq, -1, False)
        self._usable(work)
        self._seq += 1
        op = self._op(work, output, input, call.op in ("all_reduce", "broadcast"))
        self.channel.collective(op)
        return self._started(work)

    def start(self, call: Call, output: torch.Tensor, input: torch.Tensor) -> Polled:
        """A collective of host tensors as a step of another operation, which keeps them: a request to be polled."""
        work = SharedWork(self, call, self._seq, -1, False)
        self._seq += 1
        op = self._op(work, output, input, call.op in ("all_reduce", "broadcast"))
        self.channel.collective(op)
        return Polled(self.engine, op)

    def transfer(self, call: Call, tensor: torch.Tensor, peer: int, sending: bool) -> Work:
        """A send or a receive; see CheckedGroup."""
        seq = self._transfers.get((peer, sending), 0)
        work = SharedWork(self, call, seq, peer, sending)
        self._usable(work)
        self._transfers[peer, sending] = seq + 1
        op = self._op(work, None if sending else tensor, tensor if sending else None, False)
        self.channel.transfer(op, peer, sending)
        return self._started(work)

    def look(self) -> None:
        """Now and then, call the wire, which hears of the launcher's end."""
        now = time.monotonic()
        if now > self._look_at and not self.closed:
            self._look_at = now + _LOOK
            shared = self.group._shared
            with shared.progress.lock:
                self.group._wire.look()

    def _usable(self, work: SharedWork) -> None:
        self.look()
        if self.closed or self.group._failed:
            self.group._refuse_if_unusable(work)

    def _op(
        self, work: SharedWork, output: torch.Tensor | None, input: torch.Tensor | None, in_place: bool
    ) -> _C.ShmOp:
        call, ready = work.call, True
        out, inp = self.group._flat(work, call, output, input, in_place)
        if work.stage is not None:
            ready = work.stage.Test()
        header = pack(call, work.seq, self.group._id)[:_HEADER] if self.group._check else b""
        work.tensors = (out, inp)
        work.op = _C.ShmOp(
            header,
            _VERBS[call.op],
            DTYPE_CODES.get(call.dtype, 0) if call.dtype is not None else 0,
            REDUCE_CODES.get(call.reduce, 0),
            call.root,
            bool(call.refused),
            ready,
            0 if out is None else out.data_ptr(),
            0 if inp is None else inp.data_ptr(),
            call.numel,
        )
        return work.op

    def _started(self, work: SharedWork) -> Work:
        if work.stage is not None:
            work.job = Job()
            work.job.long = True
            work.job.steps = work.stage_steps(work.stage)
            self.group._shared.progress.start(work.job)
        if not work.op.over:
            self._live[id(work)] = work
            if len(self._live) > _SWEEP:
                self._live = {key: other for key, other in self._live.items() if not other.op.over}
        if work.call.refused:
            raise MismatchError(
                f"{work.text()} on group {self.group.name!r}, rank {self.group.rank}: {work.call.refused}"
            )
        return work

    def forget(self, work: SharedWork) -> None:
        """The operation is over: its tensors need not be kept."""
        self._live.pop(id(work), None)

    def close(self) -> None:
        """No tensor is touched after this; outstanding work is abandoned. The world's ends the engine's thread."""
        self.closed = True
        self.channel.close()
        if self.group._owner:
            self.engine.stop()
        self._live.clear()


class SharedWork(Work):
    """One operation in a segment. ``peer`` is -1 for a collective."""

    __slots__ = ("call", "job", "lanes", "op", "peer", "sending", "seq", "stage", "tensors")

    op: _C.ShmOp

    def __init__(self, lanes: SharedLanes, call: Call, seq: int, peer: int, sending: bool) -> None:
        self.lanes = lanes
        self.call = call
        self.seq = seq
        self.peer = peer
        self.sending = sending
        self.stage: GpuStage | None = None
        self.job: Job | None = None
        self.tensors: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    @property
    def over(self) -> bool:
        """The result or an error is there; only looks."""
        return self.op.over if self.job is None else self.job.over

    def text(self) -> str:
        words = describe(self.call, self.seq)
        return words if self.peer < 0 else f"{self._what()}: {words}"

    def _what(self) -> str:
        return f"{'send to' if self.sending else 'recv from'} rank {self.peer}"

    def stage_steps(self, stage: GpuStage) -> Steps:
        """Of a GPU tensor: the host copy becomes complete, the operation runs, the result goes back."""
        group = self.lanes.group
        yield [(stage, group.rank)]
        self.lanes.engine.release(self.op)
        yield [(Polled(self.lanes.engine, self.op), group.rank)]
        if self.op.state != _MISMATCH:
            stage.copy_back()
        stage.release()

    def done(self) -> bool:
        if self.job is not None and not self.job.over:
            self.lanes.group._shared.progress.poll(self.job)
        if not (self.lanes.engine.poll(self.op) and self.over):
            self._refuse_if_unusable()
            return False
        self._finish()
        return self.stage is None or self.stage.arrived()

    def wait(self, deadline: float | None = None) -> None:
        if not self.op.over:
            self._refuse_if_unusable()
            self._drive(self.lanes.group.deadline if deadline is None else deadline)
        if self.job is not None and not self.job.over:
            self.lanes.group._shared.progress.spin(self.job, self.lanes.group.deadline)
        self._finish()
        if self.stage is not None:
            self.stage.order()

    def _finish(self) -> None:
        self.lanes.forget(self)
        self.tensors = (None, None)
        if self.op.state == _MISMATCH:
            raise self._mismatch()

    def _drive(self, seconds: float) -> None:
        wait, op = self.lanes.engine.wait, self.op
        end = time.monotonic() + seconds
        left = seconds
        while True:
            result = wait(op, min(left, _SLICE))
            if result == _OVER:
                return
            self._refuse_if_unusable()
            self.lanes.look()
            if result == _ENDED:
                self._check_processes()
            left = end - time.monotonic()
            if left <= 0:
                raise self._late(seconds)

    def _refuse_if_unusable(self) -> None:
        lanes, group = self.lanes, self.lanes.group
        if lanes.closed and not self.op.over:
            raise GroupError(f"{self.text()} on group {group.name!r} was abandoned: the group was closed")
        if group._failed:
            group._refuse_if_unusable(self)

    def _check_processes(self) -> None:
        """Raise if a rank that this operation waits for is no more; of what others do, nothing is said."""
        lanes, group = self.lanes, self.lanes.group
        ended = {lanes.host.ranks[i] for i in lanes.engine.ended_processes()}
        gone = [r for r in lanes.channel.late(self.op, self.peer, self.sending) if group.members[r] in ended]
        if gone:
            here = f"rank {group.rank}: {self.text()} on group {group.name!r}"
            text = f"{here}: the process of {rank_list(gone, group.members)} has ended"
            group._failed = group._failed or text
            raise GroupError(text)
        time.sleep(0.01)  # somebody else's loss, which every wait reports from now on

    def _mismatch(self) -> MismatchError:
        group = self.lanes.group
        padded = [header.ljust(HEADER_BYTES, b"\0") for header in self.op.said]
        if self.peer < 0:
            said = {r: describe_header(header) for r, header in enumerate(padded)}
        else:
            other = f"{'recv from' if self.sending else 'send to'} rank {group.rank}"
            own = pack(self.call, self.seq, group._id)
            theirs, mine = (describe_header(header) for header in (padded[0], own))
            said = {self.peer: f"{other}: {theirs}", group.rank: f"{self._what()}: {mine}"}
        return MismatchError(mismatch_text(group.name, said, group.members))

    def _late(self, seconds: float) -> DeadlineError:
        lanes, group = self.lanes, self.lanes.group
        late = lanes.channel.late(self.op, self.peer, self.sending)
        instead = [
            f"rank {r} is at {_KINDS[kind].format(group.rank)}{describe_header(header)}"
            for r in late
            for kind, header in lanes.channel.unexpected(r)
        ]
        moving = self.op.state == 2
        who = rank_list(late, group.members) if late else "this rank's own part"
        state = f"all ranks had arrived, but the data of {who} had not" if moving else f"{who} had not arrived"
        here = f"rank {group.rank}: {self.text()} on group {group.name!r}"
        text = "; ".join([f"{here}: after {seconds:g} s {state}", *instead])
        group._failed = group._failed or text
        return DeadlineError(text)


class Polled:
    """An operation as a request of the progress loop."""

    def __init__(self, engine: _C.ShmEngine, op: _C.ShmOp) -> None:
        self._engine = engine
        self._op = op

    def Test(self) -> bool:
        return self._engine.poll(self._op)
