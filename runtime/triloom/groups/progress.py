"""Drives operations that are under way: whoever waits, else one thread that takes no core.

An operation is a generator of *steps*. A step it yields is either a list of ``(request, peer)``
pairs, and the generator continues when all of them are complete, or a callable, run without holding
the lock (the local sums). Both threads take turns under one lock, which also makes MPI calls one at
a time (MPI_THREAD_SERIALIZED is enough).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator
from typing import Protocol, TypeAlias

_POLL_SECONDS = 0.2e-3
_POLL_LONGEST = 4e-3
"""The thread naps ever longer while it is not needed; a long job calls it out of a long nap. (Calling it
every time costs 30 us a transfer that is waited for at once.)"""
_PARK_AFTER = 10
"""Naps without any job before the thread sleeps until it is called."""


class Request(Protocol):
    """What a step waits for: an MPI request, or a GPU copy."""

    def Test(self) -> bool: ...


Pending: TypeAlias = list[tuple[Request, int]]
Steps: TypeAlias = Generator[Pending | Callable[[], None], None, None]


class Job:
    """An operation under way. ``over``: its result (or ``error``) is there; steps may still tidy up.

    ``long``: several exchanges, so the thread should drive it soon. One of a single exchange has
    little to gain from that, and calling a thread costs as much as the exchange.
    """

    __slots__ = ("__weakref__", "busy", "error", "long", "over", "pending", "steps")

    def __init__(self) -> None:
        self.steps: Steps | None = None
        self.pending: Pending = []
        self.busy = False
        self.long = False
        self.over = False
        self.error: BaseException | None = None


class Progress:
    """The jobs of a world's groups and the thread that drives them; shared by all splits of a world."""

    def __init__(self, *, threaded: bool) -> None:
        self.lock = threading.Lock()
        self._called = threading.Condition(self.lock)
        self._jobs: list[Job] = []
        self._waiters = 0
        self._parked = False
        self._nap = _POLL_SECONDS
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._threaded = threaded

    def start(self, job: Job) -> None:
        """Take a new job and drive it as far as it goes at once."""
        with self.lock:
            self._jobs.append(job)
            self._advance(job)
            if len(self._jobs) > 1:
                self._round(job)
            if self._jobs and self._threaded:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="triloom-progress", daemon=True)
                    self._thread.start()
                elif self._parked or (job.long and self._nap > 2 * _POLL_SECONDS):
                    self._called.notify()

    def poll(self, first: Job) -> None:
        """One round over all jobs, ``first`` before the others."""
        with self.lock:
            self._advance(first)
            if not first.over and len(self._jobs) > 1:
                self._round(first)

    def spin(self, job: Job, seconds: float) -> bool:
        """Drive until ``job`` is over; False when ``seconds`` have passed.

        Yields the core at every turn, and sleeps a little when the wait is long, so that more
        ranks than cores do not starve each other.
        """
        with self.lock:
            self._waiters += 1
        try:
            begin = time.monotonic()
            turns = 0
            while True:
                self.poll(job)
                if job.over:
                    return True
                turns += 1
                if turns % 16:
                    os.sched_yield()
                    continue
                waited = time.monotonic() - begin
                if waited > seconds:
                    return False
                if waited > 1e-3:
                    time.sleep(50e-6 if waited < 20e-3 else 200e-6)
        finally:
            with self.lock:
                self._waiters -= 1
                if self._jobs and not self._waiters and self._nap > 2 * _POLL_SECONDS:
                    self._called.notify()

    def outstanding(self, jobs: Callable[[Job], bool]) -> list[Job]:
        """With the lock held: the jobs that satisfy a condition and have steps left."""
        return [job for job in self._jobs if jobs(job)]

    def drop(self, jobs: list[Job]) -> None:
        """With the lock held: stop driving these jobs."""
        self._jobs = [job for job in self._jobs if job not in jobs]

    def stop(self) -> None:
        """End the thread; jobs are driven by waits from now on."""
        with self.lock:
            self._stopping = True
            self._threaded = False
            self._called.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _round(self, skip: Job | None) -> None:
        for job in tuple(self._jobs):
            if job is not skip:
                self._advance(job)

    def _advance(self, job: Job) -> None:
        """With the lock held: run a job's steps until one is incomplete. The lock is let go for callables."""
        steps = job.steps
        if steps is None or job.busy:
            return
        while True:
            pending = job.pending
            try:
                while pending:
                    if not pending[-1][0].Test():
                        return
                    pending.pop()
                step = next(steps)
                if isinstance(step, list):
                    job.pending = step
                    continue
                job.busy = True
                self.lock.release()
                try:
                    step()
                finally:
                    self.lock.acquire()
                    job.busy = False
            except StopIteration:
                self._retire(job)
                return
            except BaseException as error:  # reaches the caller in wait()
                job.error = job.error or error
                self._retire(job)
                return

    def _retire(self, job: Job) -> None:
        job.steps = None
        job.over = True
        if job in self._jobs:
            self._jobs.remove(job)

    def _run(self) -> None:
        """The thread: a round over the jobs after each nap, unless somebody waits and so drives them."""
        unneeded = 0
        with self.lock:
            while not self._stopping:
                self._parked = unneeded > _PARK_AFTER and not self._jobs
                called = self._called.wait(None if self._parked else self._nap)  # lets the lock go
                unneeded = 0 if called or self._jobs else unneeded + 1
                if self._jobs and not self._waiters:
                    self._round(None)
                    self._nap = _POLL_SECONDS
                else:
                    self._nap = _POLL_SECONDS if called else min(2 * self._nap, _POLL_LONGEST)
