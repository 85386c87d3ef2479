"""Progress for people: one line that is rewritten on a terminal, plain lines everywhere else."""

from __future__ import annotations

import os
import time
from typing import TextIO


class LiveLine:
    """Progress on one line that is rewritten on a terminal, or a plain line every ``every`` steps elsewhere."""

    def __init__(self, out: TextIO, steps: int, every: int, live: bool | None = None) -> None:
        self._out = out
        self._steps = steps
        self._every = every
        self._live = on_terminal(out) if live is None else live
        self._shown = 0.0
        self._open = False

    def step(self, done: int, loss: float, tokens_per_s: float, seconds_left: float) -> None:
        """Show the state after ``done`` steps."""
        last = done == self._steps
        width = len(str(self._steps))
        line = (
            f"step {done:>{width}}/{self._steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  "
            f"{duration(seconds_left)} left"
        )
        now = time.monotonic()
        if self._live and (last or now - self._shown >= 0.1):
            room = _columns(self._out) - 1
            self._out.write("\r" + line[:room].ljust(min(room, 79)))
            self._shown, self._open = now, True
            self._out.flush()
        elif not self._live and (last or done == 1 or done % self._every == 0):
            self._out.write(line + "\n")
            self._out.flush()

    def say(self, text: str) -> None:
        """A line of its own, below what is shown."""
        self.close()
        self._out.write(text + "\n")
        self._out.flush()

    def close(self) -> None:
        if self._open:
            self._out.write("\n")
            self._out.flush()
            self._open = False


def on_terminal(out: TextIO) -> bool:
    """Whether a person sees ``out`` on a terminal that can rewrite a line.

    Launchers such as mpirun give every rank a terminal of its own and copy what it prints to wherever
    their own output goes, so the parent process must be looking at a terminal as well.
    """
    if not out.isatty():
        return False
    try:
        seen = os.readlink(f"/proc/{os.getppid()}/fd/1")
    except OSError:
        return False
    return seen.startswith(("/dev/pts/", "/dev/tty"))


def _columns(out: TextIO) -> int:
    """Width of the terminal; one made by a launcher may say 0."""
    try:
        return os.get_terminal_size(out.fileno()).columns or 80
    except OSError:
        return 80


def plural(count: int, noun: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """``7s``, ``1:05``, ``2:03:00``."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    if hours:
        return f"{hours}:{minutes:02}:{secs:02}"
    return f"{minutes}:{secs:02}" if minutes else f"{secs}s"


class Pace:
    """Time left, from the steps after the first: it pays for warming up."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._spent = 0.0
        self._counted = 0

    def left(self, done: int, seconds: float) -> float:
        """Seconds left after ``done`` steps, the last of which took ``seconds``."""
        if done > 1:
            self._spent += seconds
            self._counted += 1
        each = self._spent / self._counted if self._counted else seconds
        return each * (self._steps - done)
