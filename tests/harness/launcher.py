"""One mpirun, with a hard deadline and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import processes

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    gone: float
    """``time.time()`` when its last process had disappeared."""
    timed_out: bool
    leftovers: tuple[str, ...]
    """Processes that were still there 3 s after mpirun ended; they have been killed."""


def mpirun() -> str:
    """The mpirun beside this python, else the first on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise RuntimeError(f"no mpirun beside {sys.executable} and none on PATH; `make setup` installs one")
    return found


def launch(
    n: int,
    argv: Sequence[str],
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Result:
    """Run ``argv`` on ``n`` ranks and wait until every process of it is gone.

    After ``timeout`` seconds all of it is killed and ``timed_out`` is set. ``env`` adds to this process's
    environment. Output is collected in files, so a rank never blocks on a full pipe.
    """
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    segments = shared / f"triloom-{uuid.uuid4().hex}"  # of our own, so that a killed launch leaves no shared memory
    segments.mkdir()
    command = [mpirun(), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    command += ["--mca", "btl_sm_backing_directory", str(segments), "-n", str(n), *argv]
    try:
        return watch(command, timeout=timeout, env=env, cwd=cwd)
    finally:
        shutil.rmtree(segments, ignore_errors=True)


def watch(
    command: Sequence[str],
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Result:
    """Run any command, another launcher for instance, and wait until every process of it is gone; see launch."""
    tag = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="triloom-test-") as temp:
        try:
            return _watch(list(command), tag, _environment(tag, temp, env), Path(temp), cwd, timeout)
        finally:
            processes.kill(tag)


def _environment(tag: str, temp: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    env = {**os.environ, processes.TAG: tag, "TMPDIR": temp}  # TMPDIR: Open MPI's session directory
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [env.get("PYTHONPATH")])])
    return env | dict(extra or {})


def _watch(
    command: list[str], tag: str, env: dict[str, str], temp: Path, cwd: str | Path | None, timeout: float
) -> Result:
    out, err = temp / "stdout", temp / "stderr"
    begin = time.monotonic()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=env, cwd=cwd, start_new_session=True
        )
        try:
            process.wait(timeout)
            timed_out = False
        except subprocess.TimeoutExpired:
            timed_out = True
            processes.kill(tag)
            process.wait()
        except BaseException:  # Ctrl-C in pytest: leave nothing behind either
            processes.kill(tag)
            process.wait()
            raise
    left = processes.wait_gone(tag, 3.0)
    return Result(
        returncode=process.returncode,
        stdout=out.read_text(errors="replace"),
        stderr=err.read_text(errors="replace"),
        seconds=time.monotonic() - begin,
        gone=time.time(),
        timed_out=timed_out,
        leftovers=tuple(processes.describe(pid) for pid in left),
    )
