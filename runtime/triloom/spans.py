"""What each action of a step took: recorded in place while it runs, aligned over ranks by measured clock offsets.

Recording is two clock reads and four stores into memory that was there before (about half a microsecond
an action): no strings, no allocation, no communication. Everything else happens between steps.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from .actions import Action
from .groups.base import Group

COLUMNS = 4
"""begin, end, waited, until: nanoseconds of this process's clock; ``waited`` is the part of the action in
which it waited for a receive, ``until`` when that wait was over (0 without one)."""

STAMPS = (0, 1, 3)
"""The columns that are times; ``waited`` is a duration."""

ROUNDS = 32
"""Exchanges of which the fastest tells a clock's offset."""


class Spans:
    """Records the spans of one list of actions at a time; what the executor's ``record`` is."""

    def __init__(self, rows: int = 0) -> None:
        self._data = array("q", bytes(8 * COLUMNS * rows))
        self._at = 0
        self._waited = 0
        self._until = 0

    def begin(self, actions: int) -> None:
        """A list of so many actions starts; what was recorded before is overwritten."""
        if len(self._data) < COLUMNS * actions:
            self._data = array("q", bytes(8 * COLUMNS * actions))
        self._at = self._waited = self._until = 0

    def action(self, action: Action, begin_ns: int, end_ns: int) -> None:
        """The next action of the list is over."""
        data, at = self._data, self._at
        data[at] = begin_ns
        data[at + 1] = end_ns
        data[at + 2] = self._waited
        data[at + 3] = self._until
        self._at = at + COLUMNS
        if self._waited:
            self._waited = self._until = 0

    def wait(self, begin_ns: int, end_ns: int) -> None:
        """A wait for a receive, inside the action under way. Several of one action count as one that ends last."""
        self._waited += end_ns - begin_ns
        self._until = end_ns

    def rows(self) -> torch.Tensor:
        """int64 (actions, COLUMNS) of the last list; a copy."""
        return torch.tensor(self._data[: self._at], dtype=torch.int64).view(-1, COLUMNS)


class DeviceSpans:
    """The same for a GPU, by events on the stream that computes: an action begins when the one before it is over.

    Its rows are on the host's clock, which is read once a list, when the device has nothing to do. What the
    device waits for between two actions other than a receive (a launch that comes late) counts to the second.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._used = 0
        self._start_ns = 0
        self._ends: list[int] = []
        self._waits: dict[int, int] = {}

    def begin(self, actions: int) -> None:
        torch.cuda.synchronize(self._device)
        self._used = 0
        self._ends, self._waits = [], {}
        self._start_ns = time.perf_counter_ns()
        self._mark()

    def _mark(self) -> int:
        """Number of a new event at this place of the stream."""
        if self._used == len(self._events):
            self._events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._events[self._used].record(torch.cuda.current_stream(self._device))
        self._used += 1
        return self._used - 1

    def action(self, action: Action, begin_ns: int, end_ns: int) -> None:
        self._ends.append(self._mark())

    def wait(self, begin_ns: int, end_ns: int) -> None:
        self._waits[len(self._ends)] = self._mark()

    def rows(self) -> torch.Tensor:
        """As of :class:`Spans`; waits for the device."""
        self._events[self._used - 1].synchronize()
        start = self._events[0]
        at = [self._start_ns + round(start.elapsed_time(e) * 1e6) for e in self._events[: self._used]]
        rows = []
        for i, (begin, end) in enumerate(pairwise([0, *self._ends])):
            until = self._waits.get(i)
            rows.append([at[begin], at[end], *((0, 0) if until is None else (at[until] - at[begin], at[until]))])
        return torch.tensor(rows, dtype=torch.int64).view(-1, COLUMNS)


def spans_on(device: torch.device) -> Spans | DeviceSpans:
    """A recorder for actions that compute on a device."""
    return Spans() if device.type == "cpu" else DeviceSpans(device)


def gather_rows(group: Group, mine: torch.Tensor, most: int) -> torch.Tensor:
    """int64 (ranks, most, COLUMNS) on every rank of the group, missing rows 0; collective.

    most: largest number of actions of any rank, the same on all of them.
    """
    padded = torch.zeros(most, COLUMNS, dtype=torch.int64)
    padded[: len(mine)] = mine
    out = torch.empty(group.size, most, COLUMNS, dtype=torch.int64)
    group.all_gather(out.view(-1), padded.view(-1)).wait()
    return out


@dataclass(frozen=True)
class Offsets:
    """What to add to each rank's clock to get rank 0's, as measured at one time of rank 0."""

    at_ns: int
    add_ns: tuple[int, ...]
    error_ns: tuple[int, ...]
    """The offset is wrong by at most this: half of the fastest exchange."""


def clock_offsets(group: Group, rounds: int = ROUNDS) -> Offsets:
    """Measure every rank's clock against rank 0's; collective, the result is the same on every rank.

    Cristian's algorithm (F. Cristian, Probabilistic clock synchronization, Distributed Computing 3, 1989):
    a rank asks rank 0 for its time, and takes the answer for the middle of the exchange; of several
    exchanges the fastest counts, as its error is at most half of its duration. One rank after the other,
    a few microseconds an exchange.
    """
    found = torch.zeros(2, dtype=torch.int64)
    if group.rank == 0:
        for peer in range(1, group.size):
            _answer(group, peer, rounds)
    else:
        found[0], found[1] = _ask(group, rounds)
    everyone = torch.empty(group.size, 2, dtype=torch.int64)
    at = torch.tensor([time.perf_counter_ns()], dtype=torch.int64)
    group.all_gather(everyone.view(-1), found).wait()
    group.broadcast(at).wait()
    add, error = everyone.unbind(1)
    return Offsets(int(at), tuple(add.tolist()), tuple(error.tolist()))


def _answer(group: Group, peer: int, rounds: int) -> None:
    question, answer = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for _ in range(rounds):
        group.recv(question, peer).wait()
        answer[0] = time.perf_counter_ns()
        group.send(answer, peer).wait()


def _ask(group: Group, rounds: int) -> tuple[int, int]:
    """Offset and error of this rank, from its fastest exchange with rank 0."""
    question, answer = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    fastest: tuple[int, int] | None = None
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        sent = group.send(question, 0)
        group.recv(answer, 0).wait()
        end = time.perf_counter_ns()
        sent.wait()
        trip = end - begin
        if fastest is None or trip < fastest[0]:
            fastest = trip, int(answer) - (begin + end) // 2
    assert fastest is not None  # rounds is positive
    return fastest[1], (fastest[0] + 1) // 2


def align(rows: torch.Tensor, begin: Offsets, end: Offsets | None = None) -> NDArray[np.int64]:
    """Gathered rows on rank 0's clock. With a second measurement, clocks that drift apart are followed linearly.

    rows: int64 (ranks, actions, COLUMNS); the result is a copy. Stamps that are 0 (no row, no wait) stay 0.
    """
    out = rows.numpy().copy()
    add = np.array(begin.add_ns)[:, None]
    drift = np.zeros((len(out), 1))
    if end is not None and end.at_ns > begin.at_ns:
        drift = (np.array(end.add_ns)[:, None] - add) / (end.at_ns - begin.at_ns)
    for column in STAMPS:
        stamps = out[..., column]
        move = add + np.rint(drift * (stamps + add - begin.at_ns)).astype(np.int64) if drift.any() else add
        stamps += np.where(stamps == 0, 0, move)
    return out
