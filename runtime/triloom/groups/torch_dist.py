"""torch.distributed's point-to-point as a Wire: triloom's groups where a program was not started by MPI.

Only sends and receives are taken from torch, so that everything else (checks, deadlines, sums in rank order, the
same bits) is what it is over MPI. Tensors on a GPU are staged through pinned memory, as they are there.
"""

from __future__ import annotations

import atexit
import ctypes
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..errors import GroupError
from .wire import Wire
from .wired import WiredGroup

FOREVER = timedelta(days=3650)
"""Time limit given to torch, whose own expiry would close every connection: the deadline is the group's."""

HIGHEST_TAG = 2**31 - 2
_NEVER_SENT = 2**31 - 1
_AT_ONCE = timedelta(milliseconds=1)
_STOP_SECONDS = 2.0

MakeProcessGroup = Callable[[str, list[int], int], Any]
"""``(unique name, members as ranks of the first wire, own rank among them)`` -> a torch ProcessGroup of its own."""


class Waiters:
    """Threads that block in torch's waits, one for each request under way: torch completes them nowhere else.

    Daemon threads, as a rank that is waited for may never come. When the interpreter goes they must neither be inside
    torch nor let go of the last reference to an object of torch, which would end the process with SIGABRT: at exit
    every wait still under way is broken off, and the threads are joined.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._busy: dict[Any, int] = {}
        """Torch process group -> requests under way."""

    def submit(self, group: Any, wait: Callable[[], None]) -> None:
        """Call ``wait``, which blocks in a request of ``group``, on some thread."""
        with self._lock:
            self._busy[group] = self._busy.get(group, 0) + 1
            if self._idle:
                self._idle -= 1
            else:
                if not self._threads:
                    atexit.register(self.stop)
                self._threads.append(threading.Thread(target=self._run, name="triloom-wait", daemon=True))
                self._threads[-1].start()
        self._tasks.put(lambda: self._call(group, wait))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task

    def _call(self, group: Any, wait: Callable[[], None]) -> None:
        try:
            wait()
        finally:
            with self._lock:
                self._idle += 1
                self._busy[group] -= 1
                if not self._busy[group]:
                    del self._busy[group]

    def stop(self) -> None:
        """Break off every wait that is under way, which spends its group, and end the threads."""
        with self._lock:
            groups = list(self._busy)
            threads, self._threads, self._idle = self._threads, [], 0
        for group in groups:
            with suppress(RuntimeError):  # a wait that runs out of time closes the group's connections
                group.recv([torch.empty(1)], (group.rank() + 1) % group.size(), _NEVER_SENT).wait(_AT_ONCE)
        for _ in threads:
            self._tasks.put(None)
        until = time.monotonic() + _STOP_SECONDS
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))


class Request:
    """A send or a receive under way, with the interface of an MPI request."""

    def __init__(self, waiters: Waiters, group: Any, work: Any, what: str) -> None:
        self._work = work
        self._what = what
        self._complete = False
        self._error: str | None = None
        waiters.submit(group, self._wait)

    def _wait(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = str(error)
        self._complete = True

    def Test(self) -> bool:
        """True once complete. Raises GroupError if the connection is gone."""
        if self._complete and self._error is not None:
            raise GroupError(f"{self._what}: the connection failed, that rank may have died: {self._error}")
        if not self._complete:
            time.sleep(0)  # lets the interpreter lock go: whoever asks again and again keeps the waiter from it
        return self._complete


class PersistentReceive:
    """A receive that is started again and again, with the interface of an MPI request."""

    def __init__(self, receive: Callable[[], Request]) -> None:
        self._receive = receive
        self._request: Request | None = None

    def Start(self) -> None:
        self._request = self._receive()

    def Test(self) -> bool:
        return self._request is None or self._request.Test()

    def Free(self) -> None:
        self._request = None


class TorchWire(Wire):
    """The ranks of a torch ProcessGroup (gloo) that nobody else uses.

    make: makes the process groups of splits. members: the ranks of this wire as ranks of the first one.
    """

    def __init__(
        self, group: Any, make: MakeProcessGroup, *, waiters: Waiters | None = None, members: list[int] | None = None
    ) -> None:
        super().__init__(group.rank(), group.size(), highest_tag=HIGHEST_TAG)
        self._group = group
        self._make = make
        self._waiters = waiters or Waiters()
        self._members = list(range(self.size)) if members is None else members
        self._path = ""
        self._splits = 0

    def isend(self, address: int, nbytes: int, peer: int, tag: int) -> Request:
        work = self._group.send([_tensor(address, nbytes)], peer, tag)
        return Request(self._waiters, self._group, work, f"send to rank {peer}")

    def irecv(self, address: int, nbytes: int, peer: int, tag: int) -> Request:
        work = self._group.recv([_tensor(address, nbytes)], peer, tag)
        return Request(self._waiters, self._group, work, f"recv from rank {peer}")

    def recv_init(self, address: int, nbytes: int, peer: int, tag: int) -> PersistentReceive:
        return PersistentReceive(lambda: self.irecv(address, nbytes, peer, tag))

    def memory(self, address: int, nbytes: int) -> memoryview:
        return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")

    def look(self) -> None:
        """Nothing to do: gloo's own thread notices, and whoever started the ranks ends them."""

    def unexpected(self, peer: int) -> list[tuple[int, bytes]]:
        return []  # torch cannot look at a message that nobody receives

    def split(self, color: int | None, key: int) -> TorchWire | None:
        self._splits += 1
        pairs = torch.tensor([[-1 if color is None else color, key, self.rank]] * self.size)
        everyone = torch.empty_like(pairs)
        self._group.alltoall_base(everyone, pairs, [], []).wait()
        if color is None:
            return None
        ranks = [rank for _, _, rank in sorted(row for row in everyone.tolist() if row[0] == color)]
        members = [self._members[r] for r in ranks]
        path = f"{self._path}/{self._splits}.{color}"
        group = self._make(path, members, ranks.index(self.rank))
        wire = TorchWire(group, self._make, waiters=self._waiters, members=members)
        wire._path = path
        return wire

    def close(self) -> None:
        self._group = None  # the last reference: closes its connections


def _tensor(address: int, nbytes: int) -> torch.Tensor:
    """Bytes at an address, as a tensor that does not own them."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def below(store: Any, prefix: str) -> Any:
    """The part of a torch Store below a prefix."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # exported, not declared


def from_store(store: Any, rank: int, size: int, *, deadline: float, **options: Any) -> WiredGroup:
    """A group over gloo of ranks that share a torch Store; torch's registry of process groups is not touched.

    store: keys below it belong to this group. options: of WiredGroup. Raises GroupError naming the ranks that did
    not come in time.
    """

    def make(path: str, members: list[int], own: int) -> Any:
        return dist.ProcessGroupGloo(below(store, f"gloo{path}"), own, len(members), FOREVER)

    _await_ranks(store, rank, size, deadline)
    return WiredGroup(TorchWire(make("", list(range(size)), rank), make), deadline=deadline, **options)


def _await_ranks(store: Any, rank: int, size: int, deadline: float) -> None:
    """Wait until every rank has come to the store; the error names those that have not."""
    store.set(f"here/{rank}", "1")
    try:
        store.wait([f"here/{r}" for r in range(size)], timedelta(seconds=deadline))
    except RuntimeError as error:
        missing = [r for r in range(size) if not store.check([f"here/{r}"])]
        raise GroupError(
            f"rank {rank} of {size}: after {deadline:g} s these ranks had not come to torch's store: {missing}"
        ) from error
