"""Ranks as threads of one process: strict rendezvous, and a deadlock is found the moment it happens.

An operation completes only when every rank that takes part has issued it (nothing is buffered), so
a program that runs here needs no buffering anywhere. With ``lanes="fifo"`` an operation of a group
starts only after the one its rank issued before on that group, as on one CUDA stream.

One thread of a rank waits at a time: a world in which every rank that is still running waits for
something incomplete can never move again, and every rank then raises DeadlockError naming them all.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import DeadlineError, DeadlockError, GroupError, MismatchError
from ..native import reduce_ranks
from .base import Group, Lanes, Work
from .checked import CheckedGroup
from .fingerprint import Call, describe, mismatch_text, rank_list
from .solo import Solo

T = TypeVar("T")
_SlotKey = tuple[str, int, int, int]
"""("collective", seq, 0, 0) or ("transfer", seq, sender, receiver)."""


def run_threads(
    n: int, fn: Callable[[Group], T], *, deadline: float = 60.0, lanes: Lanes = "independent", name: str = "world"
) -> list[T]:
    """Run ``fn(group)`` as ``n`` ranks, each in a thread; returns the results in rank order.

    The first error of any rank is raised here (with a note naming the rank); the others meet a
    GroupError in their next wait. Raises DeadlineError with the stacks of the ranks still running
    after ``deadline`` seconds.
    """
    world = _World(n, deadline)
    results: list[Any] = [None] * n
    channel = world.channel((name,), tuple(range(n)))

    def body(rank: int) -> None:
        try:
            results[rank] = fn(ThreadsGroup(world, channel, name, rank, lanes))
        except BaseException as error:  # also pytest.skip and KeyboardInterrupt: re-raised by the caller
            world.leave(rank, error)
        else:
            world.leave(rank, None)

    threads = [threading.Thread(target=body, args=(r,), name=f"{name}-rank{r}", daemon=True) for r in range(n)]
    for t in threads:
        t.start()
    end = time.monotonic() + deadline
    for t in threads:
        t.join(max(0.0, end - time.monotonic()))
    stuck = [r for r, t in enumerate(threads) if t.is_alive()]
    if stuck and world.first_error is None:
        text = "\n".join(f"rank {r}:\n{_stack(threads[r])}" for r in stuck)
        error = DeadlineError(f"{rank_list(stuck, tuple(range(n)))} of {n} still running after {deadline} s\n{text}")
        world.fail(str(error))
        raise error
    if world.first_error is not None:
        raise world.first_error
    return results


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or -1)
    return "".join(traceback.format_stack(frame)[-4:]) if frame else "(gone)"


class _World:
    """State shared by the ranks; everything in it is guarded by ``lock``."""

    def __init__(self, size: int, deadline: float) -> None:
        self.size = size
        self.deadline = deadline
        self.lock = threading.Lock()
        self.wake = [threading.Condition(self.lock) for _ in range(size)]
        self.channels: dict[tuple[Any, ...], _Channel] = {}
        self.waiting: dict[int, ThreadWork] = {}
        self.finished: set[int] = set()
        self.first_error: BaseException | None = None
        self.failed: tuple[type[GroupError], str] | None = None

    def channel(self, key: tuple[Any, ...], members: tuple[int, ...]) -> _Channel:
        with self.lock:
            return self.channels.setdefault(key, _Channel(key[-1], members))

    def leave(self, rank: int, error: BaseException | None) -> None:
        """A rank's function returned or raised."""
        with self.lock:
            self.finished.add(rank)
            if error is not None and self.first_error is None:
                error.add_note(f"(raised on rank {rank} of {self.size})")
                self.first_error = error
                self._fail(GroupError, f"rank {rank} failed: {type(error).__name__}: {error}")
            self.check_deadlock()

    def fail(self, text: str) -> None:
        with self.lock:
            self._fail(GroupError, text)

    def _fail(self, kind: type[GroupError], text: str) -> None:
        self.failed = self.failed or (kind, text)
        for condition in self.wake:
            condition.notify_all()

    def check_deadlock(self) -> None:
        """With the lock held: fail the world if every running rank waits for something incomplete."""
        running = [r for r in range(self.size) if r not in self.finished]
        if self.failed or not running or not all(self._stuck(r) for r in running):
            return
        lines = [f"  rank {r}: {self.waiting[r].stuck_text()}" for r in running]
        lines += [f"  rank {r}: has finished" for r in sorted(self.finished)]
        self._fail(DeadlockError, "deadlock: every rank waits and nothing can complete\n" + "\n".join(sorted(lines)))

    def _stuck(self, rank: int) -> bool:
        work = self.waiting.get(rank)
        return work is not None and not work.over


class _Channel:
    """What the ranks of one group share. ``lane[r]`` holds rank r's works that have not completed (FIFO only)."""

    def __init__(self, name: str, members: tuple[int, ...]) -> None:
        self.name = name
        self.members = members
        self.slots: dict[_SlotKey, dict[int, ThreadWork]] = {}
        self.lane: list[deque[ThreadWork]] = [deque() for _ in members]


class ThreadWork(Work):
    """One rank's part in an operation. ``output`` and ``input`` are flat and share no version counter."""

    def __init__(
        self,
        group: ThreadsGroup,
        key: _SlotKey,
        call: Call,
        output: torch.Tensor | None,
        input: torch.Tensor | None,
    ) -> None:
        self.group = group
        self.key = key
        self.call = call
        self.output = None if output is None else output.data.view(-1)
        self.input = None if input is None else input.data.view(-1)
        self.over = False
        self.started = False
        self.error: GroupError | None = None

    @property
    def participants(self) -> tuple[int, ...]:
        kind, _seq, sender, receiver = self.key
        return (sender, receiver) if kind == "transfer" else tuple(range(self.group.size))

    def text(self) -> str:
        kind, seq, sender, receiver = self.key
        words = describe(self.call, seq)
        if kind == "transfer":
            sending = sender == self.group.rank
            words = f"send to rank {receiver}: {words}" if sending else f"recv from rank {sender}: {words}"
        return words

    def stuck_text(self) -> str:
        """With the lock held: what this work is and what it waits for."""
        place = f"{self.text()} on group {self.group.name!r}"
        if not self.started:
            return f"{place}, queued in its FIFO lane behind {self.group.channel.lane[self.group.rank][0].text()}"
        return f"{place}, not started by {rank_list(self.missing(), self.group.members)}"

    def missing(self) -> list[int]:
        slot = self.group.channel.slots.get(self.key, {})
        return [r for r in self.participants if r not in slot]

    def done(self) -> bool:
        with self.group.world.lock:
            return self._check()

    def wait(self, deadline: float | None = None) -> None:
        world = self.group.world
        me = self.group.members[self.group.rank]
        seconds = self.group.deadline if deadline is None else deadline
        end = time.monotonic() + seconds
        with world.lock:
            if self._check():
                return
            world.waiting[me] = self
            try:
                world.check_deadlock()
                while not self._check():
                    left = end - time.monotonic()
                    if left <= 0:
                        raise self._late(seconds)
                    world.wake[me].wait(left)
            finally:
                del world.waiting[me]

    def _check(self) -> bool:
        """With the lock held: True if complete, raises if it failed or never can complete."""
        if self.error is not None:
            raise self.error
        if self.over:
            return True
        world = self.group.world
        if world.failed:
            kind, text = world.failed
            raise kind(text if kind is DeadlockError else f"{self.text()} on group {self.group.name!r}: {text}")
        if self.group.failed:
            raise GroupError(
                f"{self.text()} on group {self.group.name!r}: an earlier operation failed: {self.group.failed}"
            )
        return False

    def _late(self, seconds: float) -> DeadlineError:
        text = f"rank {self.group.rank}: {self.stuck_text()} after {seconds:g} s"
        self.group.failed = self.group.failed or text
        return DeadlineError(text)


class ThreadsGroup(CheckedGroup):
    """One rank's view of a group whose ranks are threads; made by :func:`run_threads` and ``split``."""

    def __init__(self, world: _World, channel: _Channel, name: str, rank: int, lanes: Lanes) -> None:
        self.world = world
        self.channel = channel
        self.name = name
        self.rank = rank
        self.members = channel.members
        self.size = len(channel.members)
        self.lanes = lanes
        self.deadline = world.deadline
        self.failed = ""
        """The first operation of this rank that passed its deadline: the group takes no more from it."""
        self._seq = 0
        self._splits = 0
        self._transfers: dict[tuple[int, int], int] = {}
        self._closed = False

    def _issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        seq, self._seq = self._seq, self._seq + 1
        return self._post(ThreadWork(self, ("collective", seq, 0, 0), call, output, input))

    def _transfer(self, call: Call, tensor: torch.Tensor, peer: int, *, sending: bool) -> Work:
        ends = (self.rank, peer) if sending else (peer, self.rank)
        seq = self._transfers.get(ends, 0)
        self._transfers[ends] = seq + 1
        return self._post(ThreadWork(self, ("transfer", seq, *ends), call, tensor, tensor))

    def _post(self, work: ThreadWork) -> Work:
        with self.world.lock:
            if self._closed:
                raise GroupError(f"{work.text()} on group {self.name!r}: the group is closed")
            work._check()  # a failed world or group takes no more operations
            self.channel.lane[self.rank].append(work)
            if self.lanes == "independent" or len(self.channel.lane[self.rank]) == 1:
                _start(work)
        if work.call.refused:
            raise MismatchError(f"{work.text()} on group {self.name!r}, rank {self.rank}: {work.call.refused}")
        return work

    def _subgroup(self, parts: Sequence[Sequence[int]], name: str) -> Group:
        self._splits += 1
        for part in parts:
            if self.rank in part:
                members = tuple(self.members[r] for r in part)
                channel = self.world.channel((id(self.channel), self._splits, members, name), members)
                return ThreadsGroup(self.world, channel, name, list(part).index(self.rank), self.lanes)
        return Solo(self.members[self.rank], name)

    def close(self) -> None:
        self._closed = True


def _start(first: ThreadWork) -> None:
    """With the lock held: start a work, and whatever completions let start after it."""
    ready = deque([first])
    while ready:
        work = ready.popleft()
        work.started = True
        channel = work.group.channel
        slot = channel.slots.setdefault(work.key, {})
        slot[work.group.rank] = work
        if len(slot) < len(work.participants):
            continue
        del channel.slots[work.key]
        works = [slot[r] for r in work.participants]
        _complete(works)
        for w in works:
            lane = channel.lane[w.group.rank]
            lane.remove(w)
            if lane and not lane[0].started:
                ready.append(lane[0])


def _complete(works: list[ThreadWork]) -> None:
    """With the lock held: compare, move the data, wake the participants."""
    group = works[0].group
    if any(w.call != works[0].call or w.call.refused for w in works):
        said = {
            w.group.rank: w.text() + (" (refused there: its own arguments do not fit together)" * bool(w.call.refused))
            for w in works
        }
        text = mismatch_text(group.name, said, group.members)
        for w in works:
            w.error = MismatchError(text)
    elif works[0].input is not None:
        inputs = [w.input for w in works if w.input is not None]
        outputs = [w.output for w in works if w.output is not None]
        _MOVE[works[0].call.op](_Move(inputs, outputs, works[0].call.reduce or "sum", works[0].call.root))
    for w in works:
        w.over = True
        w.group.world.wake[w.group.members[w.group.rank]].notify_all()


class _Move(NamedTuple):
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    reduce: Any
    root: int


def _all_reduce(m: _Move) -> None:
    result = torch.empty_like(m.inputs[0])
    reduce_ranks(result, m.inputs, m.reduce)
    for out in m.outputs:
        out.copy_(result)


def _reduce_scatter(m: _Move) -> None:
    chunks = [x.view(len(m.inputs), -1) for x in m.inputs]
    results = [torch.empty_like(out) for out in m.outputs]  # an output may overlap an input
    for r, result in enumerate(results):
        reduce_ranks(result, [c[r] for c in chunks], m.reduce)
    for out, result in zip(m.outputs, results, strict=True):
        out.copy_(result)


def _all_gather(m: _Move) -> None:
    result = torch.cat(m.inputs)
    for out in m.outputs:
        out.copy_(result)


def _broadcast(m: _Move) -> None:
    for r, out in enumerate(m.outputs):
        if r != m.root:
            out.copy_(m.inputs[m.root])


def _all_to_all(m: _Move) -> None:
    n = len(m.inputs)
    for r, out in enumerate(m.outputs):
        out.copy_(torch.cat([x.view(n, -1)[r] for x in m.inputs]))


def _transfer(m: _Move) -> None:
    m.outputs[1].copy_(m.inputs[0])


_MOVE: dict[str, Callable[[_Move], None]] = {
    "all_reduce": _all_reduce,
    "reduce_scatter": _reduce_scatter,
    "all_gather": _all_gather,
    "broadcast": _broadcast,
    "all_to_all": _all_to_all,
    "transfer": _transfer,
}
"""Inputs and outputs are in participant order: group ranks, or (sender, receiver) of a transfer."""
