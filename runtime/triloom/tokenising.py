"""Tokenising a corpus before a run: one rank of each host does it, the others wait and hear how far it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .boot import World
from .config import Config
from .data import Tokenised, find, is_long, tokenise
from .errors import ConfigError, TriloomError
from .groups.objects import gather_objects
from .together import together

SHOWN_EVERY = 2.0
"""Seconds between lines of progress."""
LONGEST_TICK = 0.5
"""Seconds between two exchanges of how far the hosts are; the group's deadline is for one exchange."""


def cache_folder(config: Config) -> Path:
    """Where tokenised text is kept: ``data.cache``, or ``tokens`` beside the run directory."""
    if config.data.cache is not None:
        return Path(config.data.cache).expanduser()
    beside = Path("runs") if config.run.dir is None else Path(config.run.dir).expanduser().parent
    return beside / "tokens"


class Progress:
    """What a tokenising thread has to tell, and lines for people at a bearable rate."""

    def __init__(self) -> None:
        self.doing: tuple[str, int, int] = ("", 0, 1)
        self.said: list[str] = []
        self._shown = time.monotonic()

    def show(self, what: str, done: int, total: int) -> None:
        self.doing = (what, done, total)

    def take(self) -> list[str]:
        """What was said since the last call, while the thread may go on saying."""
        return [self.said.pop(0) for _ in range(len(self.said))]

    def line(self, doing: tuple[str, int, int]) -> str | None:
        """A line about ``doing``, None if the last one is not long ago."""
        what, done, total = doing
        if not what or time.monotonic() - self._shown < SHOWN_EVERY:
            return None
        self._shown = time.monotonic()
        return f"{what}: {done / max(1, total):.0%} of {total / 2**20:,.1f} MiB"


def tokenise_here(config: Config, out: TextIO) -> Tokenised | None:
    """Tokenise what ``[data]`` names in this process, None if there is nothing to do. Raises ConfigError."""
    found, progress = find(config.data), Progress()
    if not is_long(config.data, found):
        return None

    def show(what: str, done: int, total: int) -> None:
        if line := progress.line((what, done, total)):
            print(line, file=out, flush=True)

    def say(text: str) -> None:
        print(text, file=out, flush=True)

    return tokenise(config.data, found, cache_folder(config), show, say)


def tokenise_together(config: Config, world: World, out: TextIO) -> Tokenised | None:
    """The same on all ranks of ``world``, collective: local rank 0 of each host works, rank 0 prints.

    Every rank waits at most the group's deadline for a rank that does not answer, however long the work takes.
    Raises SetupError on every rank if one host fails, or if hosts have different text.
    """
    found = together(world.group, lambda: find(config.data))
    wanted = is_long(config.data, found)
    if not any(gather_objects(world.group, wanted)):
        return None
    progress = Progress()
    work = Work(lambda: tokenise(config.data, found, cache_folder(config), progress.show, progress.said.append))
    if wanted and world.local_rank == 0:
        work.start()
    tick = 0.01
    while True:
        work.wait(tick)
        tick = min(LONGEST_TICK, 2 * tick)
        running = work.running  # looked at first: what ended after this is told at the next tick
        state = {"running": running, "result": work.result, "error": work.error is not None}
        everyone = gather_objects(world.group, state | {"doing": progress.doing, "said": progress.take()})
        if world.rank == 0:
            _print(everyone, progress, out)
        if any(one["error"] for one in everyone):
            together(world.group, work.check)
        if not any(one["running"] for one in everyone):
            break
    return together(world.group, lambda: _same([one["result"] for one in everyone if one["result"] is not None]))


class Work:
    """A function on a thread. result: JSON of what it returned; error: what it raised."""

    def __init__(self, body: Callable[[], Tokenised]) -> None:
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None
        self._body = body
        self._thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether neither a result nor an error is there yet."""
        return self._thread is not None and self.result is None and self.error is None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="triloom tokenising", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Until the thread ends, at most ``seconds``; without one, so long: the wait must not take its core."""
        if self._thread is None:
            time.sleep(seconds)
        else:
            self._thread.join(seconds)
            if not isinstance(self.error, TriloomError | None):
                raise self.error

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        try:
            self.result = self._body().as_json()
        except Exception as error:  # raised again by the main thread
            self.error = error


def _print(everyone: list[dict[str, Any]], progress: Progress, out: TextIO) -> None:
    for text in sorted({text for one in everyone for text in one["said"]}):
        print(text, file=out, flush=True)
    running = [one["doing"] for one in everyone if one["running"]]
    slowest = min(running, key=lambda doing: doing[1] / max(1, doing[2]), default=("", 0, 1))
    if line := progress.line(slowest):
        print(line, file=out, flush=True)


def _same(results: list[dict[str, Any]]) -> Tokenised:
    if not results:
        raise ConfigError("the ranks disagree on what is to be tokenised; start every rank with the same configuration")
    if any(one != results[0] for one in results):
        raise ConfigError("the hosts tokenised different text, or with different tokenizers; give all the same data")
    return Tokenised.from_json(results[0])
