"""Shared memory and the lives of jobs: killed at any moment, one rank lost, two jobs side by side."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness import processes
from harness.launcher import mpirun

BUSY = """
import os, sys, torch, triloom
with triloom.init(threads=1, deadline=30) as world:
    assert world.group.transport == "shared memory"
    x = torch.ones(1 << 19)
    rounds = int(sys.argv[1])
    print("up", os.getpid(), flush=True)
    while rounds != 0:
        rounds -= 1
        y = torch.full_like(x, float(world.rank + 1))
        late = world.group.all_reduce(y)
        world.group.all_reduce(x[:3], "max").wait()
        late.wait()
        assert y[0] == y[-1] == 3.0
    print("done", flush=True)
"""


@contextmanager
def job(rounds: int) -> Iterator[tuple[subprocess.Popen[str], list[int], str]]:
    """Two ranks that reduce all the time; their process ids once both are at it, and the tag of the launch."""
    tag = uuid.uuid4().hex
    argv = [mpirun(), "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    argv += [sys.executable, "-c", BUSY, str(rounds)]
    running = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, processes.TAG: tag}
    )
    try:
        assert running.stdout is not None
        words = [running.stdout.readline().split() for _ in range(2)]
        assert [w[0] for w in words] == ["up", "up"]
        yield running, [int(w[1]) for w in words], tag
    finally:
        processes.kill(tag)
        running.communicate(timeout=10)


def segments(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:triloom" in line]


def named(pid: int) -> set[Path]:
    """Files of /dev/shm that a process has mapped (Open MPI's own)."""
    words = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {Path(w[5]) for w in words if len(w) == 6 and w[5].startswith("/dev/shm/")}


OPEN_MPI = ("sm_segment", "vader_segment")
"""Open MPI's own files, which its mpirun removes: nobody does if that is killed outright."""


def _end_a_rank(running: subprocess.Popen[str], ranks: list[int]) -> None:
    os.kill(random.choice(ranks), signal.SIGKILL)


def _ask_mpirun(running: subprocess.Popen[str], ranks: list[int]) -> None:
    running.terminate()


def _end_mpirun(running: subprocess.Popen[str], ranks: list[int]) -> None:
    running.kill()


ENDS: tuple[Callable[[subprocess.Popen[str], list[int]], None], ...] = (_end_a_rank, _ask_mpirun, _end_mpirun)


@pytest.mark.parametrize("turn", [pytest.param(i, marks=[pytest.mark.full] if i >= 5 else []) for i in range(20)])
def test_a_killed_job_leaves_nothing(turn: int) -> None:
    """No process, and so no segment, which has no name; nor a named file that the job had mapped (but for OPEN_MPI)."""
    with job(-1) as (running, ranks, tag):
        assert all(len(segments(pid)) >= 2 for pid in ranks)
        files = set().union(*map(named, ranks))
        time.sleep(random.random() * 0.3)
        ENDS[turn % len(ENDS)](running, ranks)
        left = processes.wait_gone(tag, 10.0)
        assert not left, f"{ENDS[turn % len(ENDS)].__name__}: {[processes.describe(pid) for pid in left]}"
    there = [file for file in files if file.exists()]
    for file in there:
        file.unlink()
    assert all(ENDS[turn % len(ENDS)] is _end_mpirun and file.name.startswith(OPEN_MPI) for file in there), there


def test_two_jobs_side_by_side() -> None:
    with job(40) as (one, *_), job(40) as (two, *_):
        for running in (one, two):
            out, _ = running.communicate(timeout=60)
            assert running.returncode == 0 and out.split() == ["done", "done"]
