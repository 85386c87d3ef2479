"""What happens to the job when one rank fails: its traceback first, then everyone ends.

Under MPI an uncaught error on one rank leaves the others waiting for ever, and a worker thread that
dies leaves its own process waiting too. The hooks here print who failed, where and why, and take the
whole job down at once with a non-zero exit. ``boot.init`` installs them, ``World.close`` restores
what was there before; importing this module changes nothing.
"""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import os
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import NoReturn

LAST_SECONDS = 0.8
"""Seconds that printing and the transport's abort may take before the process ends itself."""

DRAIN_SECONDS = 0.25
"""Of these, how long to wait for the launcher to read what was printed."""

INTERRUPTED = 130
"""Exit code after KeyboardInterrupt, as shells report it."""


def exit_code(error: BaseException) -> int:
    """Exit code that an uncaught error stands for; 0 only for a clean SystemExit."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code & 0xFF or int(error.code != 0) if isinstance(error.code, int) else 1
    return 1


def report(error: BaseException, trace: TracebackType | None, who: str, where: str) -> str:
    """The text printed for an uncaught error: one line that says who and where, then the traceback."""
    lines = traceback.format_exception(type(error), error, trace)
    return f"{who} uncaught {type(error).__name__} in {where}; taking the job down\n{''.join(lines)}"


def wait_read(fd: int, seconds: float) -> None:
    """Wait until the other end of a pipe has read it, and a moment more.

    Launchers forward a rank's stderr through a pipe and hear of an abort on another channel: without this,
    mpirun's own message about the abort often comes before the traceback that explains it.
    """
    until = time.monotonic() + seconds
    with suppress(OSError):  # not a pipe: nobody forwards it
        while int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder):
            if time.monotonic() > until:
                return
            time.sleep(0.005)
    time.sleep(seconds / 5)


class Hooks:
    """Hooks of one rank for uncaught errors in the main thread, in other threads and for early exits.

    who: the prefix of every message, ``[rank r of n on host]``.
    abort: ends all ranks of the job with an exit code; may return or block, the process ends anyway.
    main: also take over errors of the main thread and exits without ``restore``. Off for a world of one rank,
        where Python's own behaviour is right (and an interactive session must survive an error).
    """

    def __init__(self, who: str, abort: Callable[[int], None], *, main: bool = True) -> None:
        self._who = who
        self._abort = abort
        self._main = main
        self._active = False
        self._failing = threading.Lock()
        self._pid = os.getpid()
        self._sys_hook: Callable[..., object] = sys.excepthook
        self._thread_hook: Callable[..., object] = threading.excepthook
        self.code = 1
        """Exit code of the job if this rank exits without ``restore``."""

    def install(self) -> None:
        """Take over; what was installed before is remembered."""
        self._active = True
        self._sys_hook, self._thread_hook = sys.excepthook, threading.excepthook
        threading.excepthook = self._on_thread_error
        if self._main:
            sys.excepthook = self._on_main_error
            atexit.register(self._on_exit)

    def restore(self) -> None:
        """Undo install. Hooks that others put on top stay; underneath them these pass everything on."""
        self._active = False
        if threading.excepthook == self._on_thread_error:
            threading.excepthook = self._thread_hook
        if sys.excepthook == self._on_main_error:
            sys.excepthook = self._sys_hook
        atexit.unregister(self._on_exit)

    def fail(self, text: str, code: int) -> NoReturn:
        """Print ``text`` and end the whole job with ``code``. Does not return."""
        self._failing.acquire()  # a second failing thread waits here until the process is gone
        # A C-level watchdog: ends the process even if the abort hangs holding the interpreter lock.
        faulthandler.dump_traceback_later(LAST_SECONDS, exit=True, file=2)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
        data = text.encode(errors="backslashreplace")
        while data:  # the real stderr: sys.stderr may be captured, and a captured message would be lost
            data = data[os.write(2, data) :]
        wait_read(2, DRAIN_SECONDS)
        self._abort(code)
        os._exit(code)

    def _mine(self) -> bool:
        """False once restored, and in a forked child, whose errors are not the rank's."""
        return self._active and os.getpid() == self._pid

    def _on_main_error(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._mine():
            self.fail(report(error, trace, self._who, "the main thread"), exit_code(error))
        self._sys_hook(kind, error, trace)

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        error = args.exc_value if args.exc_value is not None else args.exc_type()
        code = exit_code(error)
        if self._mine() and code:
            name = args.thread.name if args.thread is not None else "an unknown thread"
            self.fail(report(error, args.exc_traceback, self._who, f"thread {name!r}"), code)
        self._thread_hook(args)

    def _on_exit(self) -> None:
        # Uncaught SystemExit reaches no hook. An exit without close() is either that or a forgotten
        # close(); in both, the other ranks would wait for this one.
        if self._mine():
            text = f"{self._who} exited without closing its world (`with triloom.init() as world:` closes it)"
            self.fail(f"{text}; taking the job down\n", self.code)
