"""A thread that ends NCCL operations which do not end by themselves, and knows who is missing.

The ranks' watchdogs tell each other over the host transport, every few seconds, how many operations
each has issued on every group and which groups it has given up. An operation past its deadline is
aborted, its error names the ranks that had not issued it; a rank whose own process is dead or frozen
does not answer, and is named for that. A group given up by one rank is given up by all within a beat.

One watchdog serves all NCCL groups of a world. It polls every ``tick`` seconds and takes no core.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from ..errors import GroupError
from .base import Group, Work

ROWS = 128
"""Groups a rank may have under one watchdog."""

_LEAVING = 3
"""Beats in which the others have surely heard what this rank said last."""
_SILENT = 2
"""Beats without an answer after which a rank counts as silent."""
_PATIENCE = 1.5
"""Seconds that neither is shorter than: a host may be busy."""


class Row(NamedTuple):
    """What a rank says of one of its groups."""

    id: int
    collectives: int
    transfers: int
    given_up: int


class Lane(Protocol):
    """A group as the watchdog sees it."""

    name: str

    def row(self) -> Row: ...

    def overdue(self, now: float) -> bool:
        """Look at the oldest operation and NCCL's state; true while an operation is past its deadline."""

    def give_up(self, board: Board | None, silence: str) -> None:
        """Abort the group; the overdue operation's error is made from the board, or says why nobody was heard."""

    def follow(self, board: Board) -> None:
        """Abort the group if the board says that another rank has."""


class Board:
    """The last thing every rank said of its groups, exchanged in rounds over ``control``.

    Only the watchdog's thread uses it and its group, so it works whatever the other threads wait for.
    """

    def __init__(self, control: Group) -> None:
        self.control = control
        self.started = 0.0
        """When the round under way, else the last one, began."""
        self.heard = 0.0
        """When the last round that has ended began: what ``said`` gives is not older."""
        self.leaving = False
        self.everybody_leaves = False
        self._work: Work | None = None
        self._mine = torch.zeros(ROWS + 1, len(Row._fields), dtype=torch.int64)
        self._every = torch.zeros(control.size, *self._mine.shape, dtype=torch.int64)
        self._seen: list[dict[int, Row]] = [{} for _ in range(control.size)]

    @property
    def busy(self) -> bool:
        return self._work is not None

    def post(self, rows: Sequence[Row]) -> None:
        """Begin a round. Raises GroupError for more groups than a round carries."""
        if len(rows) > ROWS:
            raise GroupError(f"a NCCL watchdog serves at most {ROWS} groups of a rank, this rank has {len(rows)}")
        self._mine.zero_()
        self._mine[0, 0], self._mine[0, 1] = len(rows), int(self.leaving)
        if rows:
            self._mine[1 : 1 + len(rows)] = torch.tensor(rows, dtype=torch.int64)
        self.started = time.monotonic()
        self._work = self.control.all_gather(self._every, self._mine)

    def poll(self) -> bool:
        """True when a round has ended just now."""
        if self._work is None or not self._work.done():
            return False
        self._work.wait()
        self._work = None
        tables = self._every.tolist()
        self._seen = [{row[0]: Row(*row) for row in table[1 : 1 + table[0][0]]} for table in tables]
        self.everybody_leaves = all(table[0][1] for table in tables)
        self.heard = self.started
        return True

    def said(self, world_rank: int, id: int) -> Row | None:
        """What the rank with this world rank last said of a group; None if it has no such group (yet)."""
        return self._seen[self.control.members.index(world_rank)].get(id)

    def silent(self) -> str:
        """Who does not answer, in the transport's own words; spends the board's group."""
        try:
            if self._work is not None:
                self._work.wait(0.0)
        except GroupError as error:
            return str(error)
        return ""


class Watchdog:
    """Watches the groups of one world from a daemon thread.

    control: a host group over the world that nobody else uses; None for a world of one rank. tick:
    seconds between looks; beat: seconds between rounds of the board. begin: called first in the
    thread.
    """

    def __init__(
        self, control: Group | None, begin: Callable[[], None], *, tick: float = 0.05, beat: float = 2.0
    ) -> None:
        self.board = Board(control) if control is not None and control.size > 1 else None
        self._tick, self._beat = tick, beat
        self._begin = begin
        self._lanes: list[Lane] = []
        self._lost: list[Row] = []
        """Of groups that were given up and closed: the others must still hear of it."""
        self._late: dict[int, float] = {}
        """By id of the lane: when it was seen to be overdue."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="triloom-nccl-watchdog", daemon=True)
        self._mute = ""
        """Why the board is not used any more."""

    def start(self) -> None:
        self._thread.start()

    def add(self, lane: Lane) -> None:
        with self._lock:
            self._lanes.append(lane)

    def remove(self, lane: Lane) -> None:
        with self._lock:
            if lane in self._lanes:
                self._lanes.remove(lane)
                self._lost += [lane.row()] if lane.row().given_up else []

    def stop(self) -> None:
        """End the thread. The ranks leave together; one that does not come is not waited for beyond three beats."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(self._seconds(_LEAVING) + 1.0)
        if self.board is not None:
            self.board.control.close()

    def lanes(self) -> list[Lane]:
        with self._lock:
            return list(self._lanes)

    def _run(self) -> None:
        self._begin()
        give_up_leaving = float("inf")
        while True:
            stopping = self._stopping.wait(self._tick)
            if stopping:
                time.sleep(min(self._tick, 1e-3))
                give_up_leaving = min(give_up_leaving, time.monotonic() + self._seconds(_LEAVING))
            self._exchange(stopping)
            for lane in self.lanes():
                self._look(lane)
            alone = self.board is None or bool(self._mute)
            if stopping and (alone or self._left() or time.monotonic() > give_up_leaving):
                return

    def _seconds(self, beats: int) -> float:
        return max(_PATIENCE, beats * self._beat)

    def _left(self) -> bool:
        return self.board is not None and self.board.everybody_leaves

    def _exchange(self, stopping: bool) -> None:
        board = self.board
        if board is None or self._mute:
            return
        try:
            if board.poll():
                for lane in self.lanes():
                    lane.follow(board)
            due = stopping or self._late or time.monotonic() - board.started >= self._beat
            if not board.busy and due and not board.everybody_leaves:
                board.leaving = stopping
                board.post([*(lane.row() for lane in self.lanes()), *self._lost])
        except GroupError as error:
            self._mute = str(error)

    def _look(self, lane: Lane) -> None:
        """Give up an overdue lane once the board has been heard since, or does not answer."""
        now = time.monotonic()
        if not lane.overdue(now):
            self._late.pop(id(lane), None)
            return
        since = self._late.setdefault(id(lane), now)
        if self.board is None or self._mute or self.board.heard > since:
            self._end(lane, self._mute)
        elif now - since > self._seconds(_SILENT):
            self._mute = self.board.silent() or "the other ranks' watchdogs do not answer"
            self._end(lane, self._mute)

    def _end(self, lane: Lane, silence: str) -> None:
        self._late.pop(id(lane), None)
        lane.give_up(None if silence else self.board, silence)
