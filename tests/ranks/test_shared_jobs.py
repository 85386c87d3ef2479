"""Shared memory and the lives of jobs: killed at any moment, one rank lost, several jobs side by side."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import processes
from harness.launcher import mpirun
from triloom.leftovers import SHM, abandoned

LIGHT = [str(Path(__file__).with_name("light_rank.py"))]
BUSY = """
import os, sys, torch, triloom
from pathlib import Path
from triloom import leftovers
with triloom.init(threads=1, deadline=30) as world:
    assert world.group.transport == "shared memory"
    x = torch.ones(1 << 19)
    rounds = int(sys.argv[1])
    named = filter(os.path.exists, map(str, leftovers.mapped(Path("/proc/self"))))
    os.write(1, f"{' '.join(['up', str(os.getpid()), *named])}\\n".encode())
    while rounds != 0:
        rounds -= 1
        y = torch.full_like(x, float(world.rank + 1))
        late = world.group.all_reduce(y)
        world.group.all_reduce(x[:3], "max").wait()
        late.wait()
        assert y[0] == y[-1] == 3.0
    os.write(1, b"done\\n")
"""
HEAVY = ["-c", BUSY]
MPICH = Path(sys.prefix, "launchers", "mpich", "bin")


@dataclass
class Job:
    """A launch of two ranks that reduce all the time."""

    running: subprocess.Popen[str]
    tag: str
    folder: Path
    """Where Open MPI puts its files of shared memory."""

    def up(self) -> tuple[list[int], set[Path]]:
        """Once both ranks are at it: their process ids, and the files that MPI had named."""
        assert self.running.stdout is not None
        words = [self.running.stdout.readline().split() for _ in range(2)]
        assert [word[:1] for word in words] == [["up"], ["up"]], words
        return [int(word[1]) for word in words], {Path(name) for word in words for name in word[2:]}


@contextmanager
def job(program: list[str], rounds: int, launcher: str = "openmpi") -> Iterator[Job]:
    tag = uuid.uuid4().hex
    folder = SHM / f"triloom-{tag}"
    folder.mkdir()
    python = sys.executable
    argv = [mpirun(), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "btl_sm_backing_directory"]
    argv += [str(folder)]
    if launcher == "mpich":
        argv, python = [str(MPICH / "mpiexec")], str(MPICH / "python")
    with tempfile.TemporaryDirectory(prefix="triloom-test-") as temp:
        env = {**os.environ, processes.TAG: tag, "TMPDIR": temp}
        running = subprocess.Popen(
            [*argv, "-n", "2", python, *program, str(rounds)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env,
        )  # fmt: skip
        try:
            yield Job(running, tag, folder)
        finally:
            processes.kill(tag)
            running.communicate(timeout=10)
            shutil.rmtree(folder)


def segments(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:triloom" in line]


def _end_a_rank(running: subprocess.Popen[str], ranks: list[int]) -> None:
    os.kill(random.choice(ranks), signal.SIGKILL)


def _ask_mpirun(running: subprocess.Popen[str], ranks: list[int]) -> None:
    running.terminate()


def _end_mpirun(running: subprocess.Popen[str], ranks: list[int]) -> None:
    running.kill()


End = Callable[[subprocess.Popen[str], list[int]], None]
ENDS: tuple[End, ...] = (_end_a_rank, _ask_mpirun, _end_mpirun)


def check_gone(killed: Job, how: str, names: set[Path]) -> None:
    left = processes.wait_gone(killed.tag, 10.0)
    assert not left, f"{how}: {[processes.describe(pid) for pid in left]}"
    there = [*killed.folder.iterdir(), *(name for name in names if name.exists())]
    assert not there, f"{how}: {there}"


def end_working_jobs(ends: list[End], program: list[str], launchers: list[str]) -> None:
    """Jobs side by side, each killed at a random moment of its work: no process, no file (segments have no name)."""
    with ExitStack() as stack:
        jobs = [stack.enter_context(job(program, -1, launcher)) for launcher in launchers]
        found = [one.up() for one in jobs]
        assert all(len(segments(pid)) >= 2 for ranks, _ in found for pid in ranks)
        for one, end, (ranks, names) in zip(jobs, ends, found, strict=True):
            time.sleep(random.random() * 0.2)
            end(one.running, ranks)
            check_gone(one, end.__name__, names)


@pytest.mark.parametrize("batch", range(4))
def test_killed_jobs_leave_nothing(batch: int) -> None:
    """Sixteen jobs, four at a time, of light ranks; every fourth of MPICH."""
    launchers = ["openmpi"] * 3 + ["mpich" if MPICH.is_dir() else "openmpi"]
    end_working_jobs([ENDS[(batch + i) % 3] for i in range(4)], LIGHT, launchers)


@pytest.mark.parametrize("end", [_ask_mpirun, _end_mpirun])
def test_jobs_killed_while_they_start_leave_nothing(end: End) -> None:
    """Four more. An mpirun that is killed outright while its ranks are inside MPI_Init may leave files, which a
    look at /dev/shm then finds."""
    for _ in range(2):
        with job(LIGHT, -1) as one:
            time.sleep(random.random() * 1.2)
            end(one.running, [])
            assert not processes.wait_gone(one.tag, 10.0)
            left = list(one.folder.iterdir())
            assert set(left) == set(abandoned(one.folder))
            assert end is _end_mpirun or not left


@pytest.mark.parametrize("turn", [pytest.param(i, marks=[pytest.mark.full] if i >= 3 else []) for i in range(20)])
def test_a_killed_world_leaves_nothing(turn: int) -> None:
    """The same of a whole triloom world."""
    end_working_jobs([ENDS[turn % len(ENDS)]], HEAVY, ["openmpi"])


def test_two_jobs_side_by_side() -> None:
    with job(HEAVY, 40) as one, job(HEAVY, 40) as two:
        for each in (one, two):
            ranks, names = each.up()
            assert len(ranks) == 2 and not names, "MPI's files have names while the job works"
            assert each.running.stdout is not None and each.running.stdout.read().split() == ["done", "done"]
            assert each.running.wait(timeout=60) == 0


LOSES_ONE = """
import os, time, torch, triloom
from triloom.errors import GroupError
world = triloom.init(threads=1, deadline=60, hooks=False)
group = world.group
assert group.transport == "shared memory" and world.launcher == "torch-env"
sub = group.split([[1, 0]], "backwards")
group.barrier().wait()
if world.rank == 1:
    os.kill(os.getpid(), 9)
begin = time.monotonic()
for of, call in ((group, lambda: group.all_reduce(torch.ones(1 << 20))), (sub, lambda: sub.recv(torch.ones(5), 0))):
    for _ in range(2):
        try:
            call().wait()
        except GroupError as error:
            print(error, flush=True)
print(time.monotonic() - begin, flush=True)
os._exit(0)
"""


def test_a_lost_rank_is_named_at_once() -> None:
    """Nobody started these ranks who would end the one that is left."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", LOSES_ONE]
    ranks = [
        subprocess.Popen(command, env={**env, "RANK": str(r)}, stdout=subprocess.PIPE, text=True) for r in range(2)
    ]
    try:
        out, _ = ranks[0].communicate(timeout=90)
        assert ranks[1].wait(timeout=10) == -signal.SIGKILL
    finally:
        for rank in ranks:
            rank.kill()
    *errors, seconds = out.splitlines()
    first, again, second, _ = errors
    assert re.search(r"all_reduce float32\[1048576\] sum #\d+ on group 'world': the process of rank 1 has end", first)
    assert "an earlier operation failed: rank 0: all_reduce" in again
    assert "recv from rank 0: transfer float32[5] #0 on group 'backwards'" in second
    assert second.endswith("the process of rank 0 (world 1) has ended")
    assert float(seconds) < 20
