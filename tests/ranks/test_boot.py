"""Boot under mpirun: who is where, and that a failing rank takes the job down, its own traceback first."""

from __future__ import annotations

import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch

from harness import launch
from triloom import boot
from triloom.doctor import HOST, RANKS, Place, examine
from triloom.errors import ConfigError

FAILING = str(Path(__file__).with_name("failing.py"))

DOWN = 2.0
"""Seconds from the error until the last process of the job is gone."""


@pytest.mark.ranks(2, 3)
def test_world_describes_this_rank(world: boot.World) -> None:
    assert (world.rank, world.size) == (world.group.rank, world.group.size)
    assert world.launcher == "openmpi"
    assert (world.local_rank, world.local_size) == (world.rank, world.size)  # all on this host
    assert world.threads == max(1, len(os.sched_getaffinity(0)) // world.size) == torch.get_num_threads()
    ranks = torch.zeros(world.size, dtype=torch.int64)
    world.group.all_gather(ranks, torch.tensor([world.rank])).wait()
    assert ranks.tolist() == list(range(world.size))


@pytest.mark.ranks(2)
def test_second_init_is_equal_and_leaves_the_first_alone(world: boot.World) -> None:
    hooks = (sys.excepthook, threading.excepthook)
    with boot.init(deadline=20) as second:
        assert second == world
        x = torch.full((3,), float(world.rank))
        second.group.all_reduce(x).wait()
        assert x.tolist() == [1.0] * 3
    second.close()  # closing twice is harmless
    assert (sys.excepthook, threading.excepthook) == hooks
    y = torch.ones(2)
    world.group.all_reduce(y).wait()
    assert y.tolist() == [2.0] * 2


@pytest.mark.ranks(2)
def test_what_is_passed_is_taken(world: boot.World) -> None:
    other = boot.init(threads=3, device="meta", local_rank=1, local_size=4, hooks=False, group=world.group)
    assert (other.threads, other.device, other.local_rank, other.local_size) == (3, torch.device("meta"), 1, 4)
    assert other.launcher == "given"
    assert other.group is world.group
    assert torch.get_num_threads() == 3


@pytest.mark.ranks(3)
def test_a_communicator_can_be_handed_in(world: boot.World) -> None:
    """Backwards, without rank 1; it stays the caller's."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD.Split(MPI.UNDEFINED if world.rank == 1 else 0, -world.rank)
    if world.rank == 1:
        with pytest.raises(ConfigError, match="must be an mpi4py intracommunicator that holds this process"):
            boot.init(comm=comm, hooks=False)
        return
    with boot.init(comm=comm, hooks=False, deadline=20) as handed:
        assert (handed.rank, handed.size, handed.launcher) == (1 - world.rank // 2, 2, "comm")
        x = torch.tensor([float(world.rank)])
        handed.group.all_reduce(x).wait()
        assert x.item() == 2.0
    assert comm.allreduce(1) == 2
    comm.Free()


@pytest.mark.ranks(2)
def test_doctor_looks_at_ranks_together(world: boot.World, tmp_path: Path) -> None:
    lines = {line.name: line for line in examine(Place(tmp_path, world))}
    assert list(lines) == [probe.name for probe in (*HOST, *RANKS)]
    assert lines["launcher"].says == "openmpi, 2 ranks"
    assert lines["MPI"].data["name"] == "Open MPI" == lines["mpirun"].data["version"][:8]
    assert lines["agreement"].verdict == "ok" and lines["nodes"].data["node"] == [0, 0]
    assert lines["latency"].data["seconds"] > 0 and lines["bandwidth"].data["inside"] > 0


@pytest.mark.parametrize(
    ("how", "error", "where", "code"),
    [
        ("main", "ValueError: broken in main", "ValueError in the main thread", 1),
        ("thread", "ValueError: broken in a worker", "ValueError in thread 'loader'", 1),
        ("backward", "ValueError: broken inside backward", "ValueError in the main thread", 1),
        ("interrupt", "KeyboardInterrupt", "KeyboardInterrupt in the main thread", 130),
    ],
)
def test_uncaught_error_takes_the_job_down(how: str, error: str, where: str, code: int) -> None:
    result = launch(3, [sys.executable, FAILING, how], timeout=60)
    assert result.returncode == code, result.stderr
    assert not result.timed_out and not result.leftovers
    head = rf"\[rank 1 of 3 on \S+\] uncaught {re.escape(where)}; taking the job down\nTraceback \(most recent"
    assert re.match(head, from_ranks(result.stderr)), result.stderr  # the culprit first
    assert error in result.stderr
    assert result.stderr.count("Traceback") == 1, result.stderr  # and nobody else
    assert result.gone - happened(result.stdout) < DOWN


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("exit", 7, "[rank 1 of 2"),
        ("unclosed", 1, "with triloom.init() as world:"),
        ("kill", 137, "signal 9"),
    ],
)
def test_leaving_early_takes_the_job_down(how: str, code: int, says: str) -> None:
    result = launch(2, [sys.executable, FAILING, how], timeout=60)
    assert result.returncode == code, result.stderr
    assert not result.timed_out and not result.leftovers
    assert says in result.stderr
    assert result.gone - happened(result.stdout) < DOWN


def test_clean_end_is_silent() -> None:
    result = launch(2, [sys.executable, FAILING, "clean"], timeout=60)
    assert (result.returncode, result.stderr, result.stdout, result.leftovers) == (0, "", "", ())


def from_ranks(stderr: str) -> str:
    """Without mpirun's own messages: blocks between two dashed lines. It prints them on hearing of the abort, which on
    a busy machine may be before it forwards what the rank had printed."""
    return re.sub(r"(?ms)^-{70,}$.*?^-{70,}$", "", stderr).lstrip()


def happened(stdout: str) -> float:
    (when,) = re.findall(r"HAPPENS (\S+)", stdout)
    return float(when)
