"""Boot without other processes: launchers, cores, and the hooks of a world of one rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from triloom import boot
from triloom.errors import ConfigError
from triloom.groups.solo import Solo
from triloom.hooks import Hooks, exit_code


def test_plain_python_is_one_rank() -> None:
    with boot.init(environ={}) as world:
        assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
        assert world.launcher == "python"
        assert world.threads == torch.get_num_threads() <= max(1, len(os.sched_getaffinity(0)))
        x = torch.ones(2)
        world.group.all_reduce(x).wait()
        assert x.tolist() == [1.0, 1.0]
        assert boot.init(environ={}, hooks=False) == world


def test_hooks_are_restored() -> None:
    before = (sys.excepthook, threading.excepthook)
    outer, inner = boot.init(environ={}), boot.init(environ={})
    assert threading.excepthook != before[1]
    inner.close()
    outer.close()
    assert (sys.excepthook, threading.excepthook) == before


@pytest.mark.parametrize(
    ("env", "name", "launcher", "size"),
    [
        ({}, None, "python", 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, None, "openmpi", 4),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "one", "one", 1),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "openmpi", "openmpi", 1),
        ({"SLURM_NTASKS": "4"}, "one", "one", 1),
    ],
)
def test_find_launcher(env: dict[str, str], name: str | None, launcher: str, size: int) -> None:
    row, announced = boot.find_launcher(env, name)
    assert (row.name, announced) == (launcher, size)


@pytest.mark.parametrize(
    ("env", "arguments", "says"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}, {}, r"SLURM_NTASKS=4.*task 2.*world of 1 rank.*srun --mpi=pmix"),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, {}, "OMPI_COMM_WORLD_SIZE='many' must be a number"),
        ({}, {"launcher": "openmpi"}, "launcher='openmpi' was asked for, but it did not start this process"),
        ({}, {"launcher": "pbs"}, "launcher must be one of 'torchrun', 'openmpi', .*'one', got 'pbs'"),
        ({}, {"threads": 0}, "threads must be a positive integer, got 0 on local rank 0"),
        ({}, {"deadline": 0.0}, "deadline must be a positive number of seconds, got 0.0"),
        ({}, {"local_rank": 2}, "local_rank=2 is not in local_size=1"),
    ],
)
def test_what_cannot_work_is_refused(env: dict[str, str], arguments: dict[str, object], says: str) -> None:
    hook = threading.excepthook
    with pytest.raises(ConfigError, match=says):
        boot.init(environ=env, **arguments)  # type: ignore[arg-type]
    assert threading.excepthook == hook  # a refused init leaves nothing installed


def test_missing_mpi4py_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "mpi4py.py").write_text("raise ImportError('hidden for this test')\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    ended = subprocess.run(
        [sys.executable, "-c", "import triloom; triloom.init()"], env=env, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert 'rank 2: openmpi started 4 ranks, but mpi4py is not installed: pip install "triloom[mpi]"' in ended.stderr


def test_threads_and_device_can_be_passed_or_come_from_the_user() -> None:
    threads = torch.get_num_threads()
    try:
        assert boot.init(environ={"OMP_NUM_THREADS": "3"}, hooks=False).threads == 3 == torch.get_num_threads()
        assert boot.init(environ={"OMP_NUM_THREADS": "3"}, threads=2, hooks=False).threads == 2
        group = Solo(name="mine")
        world = boot.init(group=group, local_rank=2, local_size=4, device="meta", hooks=False, environ={})
        assert (world.group, world.local_rank, world.device.type, world.launcher) == (group, 2, "meta", "given")
    finally:
        torch.set_num_threads(threads)


ONE, TWO = frozenset({"0"}), frozenset({"0", "1"})


@pytest.mark.parametrize(
    ("cores", "rank", "quota", "threads"),
    [
        ((frozenset(map(str, range(8))),) * 4, 3, None, 2),  # nobody bound: divided
        ((ONE, frozenset({"1"})), 1, None, 1),  # bound to a core each: not divided again
        ((frozenset("01"), frozenset("23")), 0, None, 2),
        ((TWO,) * 4, 0, None, 1),  # oversubscribed: at least one
        ((TWO, ONE), 0, None, 1),  # one core alone and half of the other
        ((frozenset(map(str, range(64))),), 0, 4.0, 4),  # a container with 4 cores' worth of time on a big host
        ((frozenset(map(str, range(64))),) * 2, 0, 3.0, 1),
    ],
)
def test_share_cores(cores: tuple[frozenset[str], ...], rank: int, quota: float | None, threads: int) -> None:
    assert boot.share_cores(cores, rank, quota) == threads


@given(st.lists(st.frozensets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=8))
def test_shares_never_exceed_the_cores(cores: list[frozenset[str]]) -> None:
    shares = [boot.share_cores(cores, r) for r in range(len(cores))]
    assert all(1 <= share <= len(mine) for share, mine in zip(shares, cores, strict=True))
    assert sum(share for share in shares if share > 1) <= len(frozenset().union(*cores))


@pytest.mark.parametrize(("text", "quota"), [("max 100000", None), ("250000 100000", 2.5), (None, None)])
def test_cpu_quota(tmp_path: Path, text: str | None, quota: float | None) -> None:
    if text is not None:
        (tmp_path / "cpu.max").write_text(text)
    assert boot.cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(), 0),
        (SystemExit(0), 0),
        (SystemExit(3), 3),
        (SystemExit(256), 1),
        (SystemExit("text"), 1),
    ],
)
def test_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def run(program: str) -> tuple[subprocess.CompletedProcess[str], float]:
    begin = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return ended, time.monotonic() - begin


def test_a_worker_that_dies_ends_a_world_of_one_rank() -> None:
    ended, seconds = run(
        "import triloom, threading, time\n"
        "triloom.init()\n"
        "threading.Thread(target=lambda: 1 / 0, name='loader').start()\n"
        "time.sleep(50)"
    )
    assert ended.returncode == 1 and seconds < 40
    assert ended.stderr.startswith("[rank 0 of 1 on "), ended.stderr
    assert "uncaught ZeroDivisionError in thread 'loader'" in ended.stderr


def test_the_main_thread_of_one_rank_stays_pythons() -> None:
    ended, _ = run("import triloom\nwith triloom.init():\n    raise ValueError('mine')")
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback") and ended.stderr.endswith("ValueError: mine\n")


HANGING = """
import sys, time, threading
from triloom.hooks import Hooks
print("before", end="")          # buffered output must not be lost
def abort(code):
    print("aborting", code, file=sys.stderr, flush=True)
    time.sleep(50)
Hooks("[rank 1 of 2 on here]", abort).install()
raise ValueError("first")
"""


def test_an_abort_that_hangs_does_not_keep_the_process() -> None:
    ended, seconds = run(HANGING)
    assert ended.returncode == 1 and seconds < 40
    assert ended.stdout == "before"
    head, _, tail = ended.stderr.partition("ValueError: first\n")
    assert head.startswith("[rank 1 of 2 on here] uncaught ValueError in the main thread; taking the job down")
    assert tail.startswith("aborting 1")


def test_a_forked_child_keeps_pythons_hooks() -> None:
    ended, _ = run(
        "import os, sys\n"
        "from triloom.hooks import Hooks\n"
        "hooks = Hooks('[who]', lambda code: os._exit(9)); hooks.install()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    raise ValueError('in the child')\n"
        "code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n"
        "hooks.restore()\n"
        "sys.exit(40 + code)"
    )
    assert ended.returncode == 41, ended.stderr
    assert ended.stderr.startswith("Traceback")


def test_restored_hooks_under_others_pass_on() -> None:
    seen: list[str] = []
    before = threading.excepthook
    threading.excepthook = lambda args: seen.append(str(args.exc_value))
    try:
        hooks = Hooks("[who]", lambda code: None, main=False)
        hooks.install()
        mine = threading.excepthook
        threading.excepthook = lambda args: mine(args)  # somebody else's, on top
        hooks.restore()
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    finally:
        threading.excepthook = before
    assert seen == ["division by zero"]
