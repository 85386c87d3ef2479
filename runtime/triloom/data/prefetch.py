"""The batches of one rank in order, cut ahead of their use by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType

import numpy as np

from .batches import Batch, Samples, share_of

LOCATED = 4096
"""Samples whose places are computed together: a permutation costs 0.2 to 1 ms, for one sample or for thousands."""


class Feed:
    """Batches of dp rank ``dp_rank``, of ``size`` samples over all ranks, from sample ``first`` on.

    ahead: batches that a thread of its own keeps ready; 0: no thread. What is served does not depend on it. The
    thread ends with :meth:`close`, or with the ``with`` that the feed is used in.
    """

    def __init__(
        self, samples: Samples, size: int, *, dp: int = 1, dp_rank: int = 0, first: int = 0, ahead: int = 0
    ) -> None:
        self.position = first
        """First sample of the next batch: the one number that a restart needs, on any dp."""
        self._size = size
        self._batches = _batches(samples, size, dp, dp_rank, first)
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(max(1, ahead))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if ahead:
            self._thread = threading.Thread(target=self._fill, name="triloom data", daemon=True)
            self._thread.start()

    def next(self) -> Batch:
        """The next batch: inputs and targets, int64 [share, seq] each. Raises what went wrong in cutting it."""
        if self._closed.is_set():
            raise RuntimeError("this feed is closed")
        batch: Batch | BaseException = next(self._batches) if self._thread is None else self._queue.get()
        if isinstance(batch, BaseException):
            self.close()
            raise batch
        self.position += self._size
        return batch

    def close(self) -> None:
        """End the thread. Closing twice is harmless."""
        self._closed.set()
        while self._thread is not None and self._thread.is_alive():
            with suppress(queue.Empty):
                self._queue.get_nowait()  # the thread may wait for room
            self._thread.join(0.01)
        self._thread = None

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _fill(self) -> None:
        while not self._closed.is_set():
            try:
                batch: Batch | BaseException = next(self._batches)
            except BaseException as error:  # told by the next call of next()
                batch = error
            self._queue.put(batch)
            if isinstance(batch, BaseException):
                return


def _batches(samples: Samples, size: int, dp: int, dp_rank: int, first: int) -> Iterator[Batch]:
    share = share_of(size, dp)
    together = max(1, LOCATED // share)
    while True:
        starts = first + size * np.arange(together, dtype=np.int64) + dp_rank * share
        where = samples.locate((starts[:, None] + np.arange(share)).ravel())
        for i in range(together):
            yield samples.read(where.part(i * share, (i + 1) * share))
        first += size * together
