"""Finding and ending every process of one launch, whatever group, session or parent it has now."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

TAG = "TRILOOM_TEST_LAUNCH"
"""Environment variable that marks the processes of a launch; children inherit it."""


def tagged(tag: str) -> list[int]:
    """Live processes started with this tag (a zombie has no environment and does not count)."""
    wanted = f"{TAG}={tag}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # gone meanwhile, or another user's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def describe(pid: int) -> str:
    """``pid: command line`` for messages."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return f"{pid}: {b' '.join(words).decode(errors='replace')[:120]}"
    return f"{pid}: gone meanwhile"


def wait_gone(tag: str, seconds: float) -> list[int]:
    """Wait until no process of the launch is left; the ones still there after ``seconds``."""
    until = time.monotonic() + seconds
    while (left := tagged(tag)) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def kill(tag: str) -> None:
    """End the launch: first SIGTERM (ranks write their stacks on it), then SIGKILL until nothing is left."""
    for sig, grace in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        for pid in tagged(tag):
            with suppress(ProcessLookupError):
                os.kill(pid, sig)
        if not wait_gone(tag, grace):
            return
    raise RuntimeError(f"processes survive SIGKILL: {[describe(pid) for pid in tagged(tag)]}")
