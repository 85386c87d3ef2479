"""One operation of a NCCL group: a mark on its stream, a deadline that the watchdog keeps, and tensors kept alive.

Waiting makes the current stream wait, never the host; see nccl_group.py for failures and for CUDA graphs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import GroupError
from .base import Work
from .nccl_streams import Mark
from .nccl_watchdog import Board

if TYPE_CHECKING:
    from .nccl_group import NCCLGroup


class NCCLWork(Work):
    """One operation of a NCCLGroup. ``keep``: tensors that must live until it is over."""

    __slots__ = ("_mark", "captured", "due", "group", "keep", "late_ranks", "seconds", "text")

    def __init__(self, group: NCCLGroup, text: str, late_ranks: Callable[[Board], list[int]], captured: bool) -> None:
        self.group = group
        self.text = text
        self.late_ranks = late_ranks
        """Group ranks that, by the board, have not issued their part."""
        self.captured = captured
        self.seconds = group.deadline
        self.due = time.monotonic() + self.seconds
        self.keep: tuple[torch.Tensor, ...] = ()
        self._mark: Mark = None

    def place(self) -> str:
        return f"rank {self.group.rank}: {self.text} on group {self.group.name!r}"

    def issued(self, mark: Mark, keep: tuple[torch.Tensor, ...]) -> None:
        self._mark, self.keep = mark, keep

    def reached(self) -> bool:
        return self.group.streams.reached(self._mark)

    def done(self) -> bool:
        """As in Work; False while a capture is under way, which knows no "done"."""
        capturing = self.group.streams.capturing()
        if capturing:
            return False
        self._refuse_if_captured(capturing)
        self.group.raise_if_failed(self)
        return self.reached()

    def wait(self, deadline: float | None = None) -> None:
        """Make the current stream wait; returns at once. ``deadline`` may bring the watchdog's forward."""
        capturing = self.group.streams.capturing()
        self._refuse_if_captured(capturing)
        if deadline is not None and time.monotonic() + deadline < self.due:
            self.seconds, self.due = deadline, time.monotonic() + deadline
        self.group.raise_if_failed(self)
        self.group.streams.order(self._mark)
        self.group.raise_if_failed(self)
        self.keep = ()  # memory freed from here on is reused behind the operation

    def synchronize(self, deadline: float | None = None) -> None:
        """Block the host until done; raises like wait, and DeadlineError when the watchdog has given up."""
        self.wait(deadline)
        nap = 1e-5
        while not self.done():
            time.sleep(nap)
            nap = min(2 * nap, 1e-3)

    def _refuse_if_captured(self, capturing: bool) -> None:
        if self.captured and not capturing:
            raise GroupError(
                f"{self.place()} was captured into a CUDA graph and runs when that is replayed: wait for it before "
                "the capture ends, and for the replay by the stream it runs on"
            )
        if capturing and not self.captured:
            raise GroupError(f"{self.place()} was issued before this capture began: wait for it before capturing")


class BarrierWork(NCCLWork):
    """A barrier holds back the host too, unless it is captured."""

    __slots__ = ()

    def wait(self, deadline: float | None = None) -> None:
        super().wait(deadline)
        nap = 1e-5
        while not self.captured and not self.done():
            time.sleep(nap)
            nap = min(2 * nap, 1e-3)

    synchronize = wait
