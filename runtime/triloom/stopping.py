"""A run that is told to stop: by SIGTERM, SIGUSR1 or Ctrl-C. The first signal is a wish, the second an order."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

STOP = 4
"""The bit of ``Totals.notices`` that says that a rank was told to stop."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stop:
    """Takes the signals inside its ``with``, in the main thread; elsewhere (ranks that are threads) it does nothing.

    A thread of its own hears of a signal even while the main thread waits for other ranks in native code: the second
    one ends this process at once. speak: say on stderr what will happen.
    """

    def __init__(self, *, speak: bool = False) -> None:
        self.signal: str | None = None
        """Name of the signal that came; None: none has."""
        self._speak = speak
        self._before: dict[int, Any] = {}
        self._pipe = (-1, -1)
        self._wakeup = -1

    def notice(self) -> int:
        """For ``Totals.notices``."""
        return STOP if self.signal is not None else 0

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)
            self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _nothing) for number in SIGNALS}
            threading.Thread(target=self._listen, args=(self._pipe[0],), name="triloom-signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._before = {}
        os.close(self._pipe[1])  # ends the thread, which closes the other end

    def _listen(self, pipe: int) -> None:
        while heard := os.read(pipe, 1):
            number = heard[0]
            if number not in SIGNALS:
                continue
            if self.signal is not None:
                os._exit(128 + number)
            self.signal = signal.Signals(number).name
            if self._speak:
                with suppress(OSError):
                    text = f"triloom: {self.signal}: saving after this step, then leaving; once more leaves at once\n"
                    os.write(sys.stderr.fileno(), text.encode())
        os.close(pipe)


def _nothing(number: int, frame: FrameType | None) -> None:
    """The thread hears it."""
