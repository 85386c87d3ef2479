"""One rank of a launch: reports every case through a file, and keeps the ranks together between cases."""

from __future__ import annotations

import faulthandler
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triloom import boot

WAITING = 10.0
"""Seconds that ranks which finished a case wait longer than those still in it may take: the stuck ones end first."""


class RankSession:
    """What child.py keeps while it runs its cases.

    Files in ``folder``, per rank r: ``r.jsonl`` holds one object a line, ``{"case", "event": "start" | "end", ...}``,
    written through at once, so that a crash loses nothing; ``r.stacks`` the stacks of a rank that hung or was ended.
    """

    def __init__(self, folder: Path, deadline: float) -> None:
        self.deadline = deadline
        self.world = boot.init(deadline=deadline)
        self._lines = (folder / f"{self.world.rank}.jsonl").open("a", buffering=1)
        self._stacks = (folder / f"{self.world.rank}.stacks").open("a", buffering=1)
        faulthandler.enable(file=self._stacks)
        faulthandler.register(signal.SIGTERM, file=self._stacks, chain=True)

    def write(self, **line: Any) -> None:
        self._lines.write(json.dumps({**line, "time": time.time()}) + "\n")

    @contextmanager
    def case(self, key: str, timeout: float) -> Iterator[dict[str, Any]]:
        """Around one case; what is put into the given dict becomes its end line. Then all ranks meet."""
        self.write(case=key, event="start")
        self._stacks.write(f"\n== {key}\n")
        faulthandler.dump_traceback_later(timeout, exit=True, file=self._stacks)
        outcome: dict[str, Any] = {}
        yield outcome
        self.write(case=key, event="end", **outcome)
        faulthandler.dump_traceback_later(timeout + WAITING, exit=True, file=self._stacks)
        self._meet()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def fresh_world(self) -> Iterator[boot.World]:
        """The world of one case, with a group of its own: a failed case leaves nothing in it for the next."""
        world = boot.init(deadline=self.deadline, hooks=False)
        try:
            yield world
        finally:
            world.group.close()

    def _meet(self) -> None:
        if self.world.size > 1:
            from mpi4py import MPI

            request = MPI.COMM_WORLD.Ibarrier()
            while not request.Test():
                time.sleep(0.001)

    def close(self) -> None:
        self.world.close()
