"""The same program under every launcher that can be had: groups alike, losses alike to the last bit.

MPICH, torchrun and adopted worlds on 2 ranks in `make test`; Intel MPI, 4 ranks and the rest in `make test-full`.
srun and Open MPI 4 cannot be started here: test_launchers.py of tests/pure has their variables.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import nccl_fake
from harness import launch, watch

HERE = Path(__file__).parent
PROGRAM = str(HERE / "launched.py")
FAILING = str(HERE / "failing.py")
BIN = Path(sys.executable).parent
VENV = Path(sys.prefix)

Found = dict[str, Any]


def other_mpi(name: str) -> Path:
    """bin/ of the venv with another MPI."""
    folder = VENV / "launchers" / name / "bin"
    if not folder.is_dir():
        pytest.skip(f"{name} is not installed beside .venv: `make launchers`")
    return folder


def command(launcher: str, n: int) -> list[str]:
    """What starts ``n`` ranks of a python program."""
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc-per-node", str(n), "--standalone"]
    folder = other_mpi(launcher)
    return [str(folder / "mpiexec"), "-n", str(n), str(folder / "python")]


def start(launcher: str, n: int, folder: Path, *words: str, env: dict[str, str] | None = None) -> Found:
    """Run launched.py under a launcher; what its rank 0 wrote."""
    out = folder / "-".join((launcher, str(n), *words))
    arguments = [PROGRAM, words[0], str(out), *words[1:]]
    if launcher == "openmpi":
        result = launch(n, [sys.executable, *arguments], timeout=100, env=env)
    else:
        result = watch([*command(launcher, n), *arguments], timeout=100, env=env)
    assert result.returncode == 0 and not result.timed_out, result.stdout[-2000:] + result.stderr[-6000:]
    assert not result.leftovers
    found: Found = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def openmpi(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """2 ranks of Open MPI, the ones to equal; DDP runs inside of triloom's world."""
    return start("openmpi", 2, tmp_path_factory.mktemp("openmpi"), "inside")


NAME = {"mpich": "mpich", "impi-rt": "intel", "torchrun": "torchrun"}
full = pytest.mark.full


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("mpich", ("wire",)),
        ("torchrun", ("wire",)),
        pytest.param("torchrun", (), marks=full),
        pytest.param("mpich", (), marks=full),
        pytest.param("impi-rt", (), marks=full),
        pytest.param("impi-rt", ("wire",), marks=full),
    ],
)
def test_two_ranks(launcher: str, words: tuple[str, ...], openmpi: Found, tmp_path: Path) -> None:
    """The whole matrix of groups and five steps; through shared memory, or "wire": MPI or gloo alone."""
    found = start(launcher, 2, tmp_path, "launched", *words)
    assert (found["launcher"], found["ranks"], found["local"]) == (NAME[launcher], 2, [0, 2])
    assert found["losses"] == openmpi["losses"]


def test_a_ddp_program_takes_triloom_in(openmpi: Found, tmp_path: Path) -> None:
    """Neither disturbs the other: DDP's losses are those it has inside of triloom's world, triloom's those of MPI."""
    found = start("torchrun", 2, tmp_path, "adopt", "wire")
    assert (found["launcher"], found["ranks"]) == ("adopted", 2)
    assert (found["losses"], found["ddp"]) == (openmpi["losses"], openmpi["ddp"])


def test_nccl_over_an_adopted_world(openmpi: Found, tmp_path: Path) -> None:
    """The stand-in for NCCL between two processes: the same losses over it, ordered sums asked for."""
    env = {"FAKE_NCCL": str(nccl_fake.build(tmp_path)), "FAKE_NCCL_SHARED": str(tmp_path / "shared")}
    found = start("torchrun", 2, tmp_path, "nccl", "wire", env=env)
    assert (found["launcher"], found["losses"]) == ("adopted", openmpi["losses"])


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return start("openmpi", 4, tmp_path_factory.mktemp("openmpi"), "inside")


@full
@pytest.mark.parametrize("task", ["launched", "adopt"])
def test_four_ranks_of_torch(task: str, four: Found, tmp_path: Path) -> None:
    found = start("torchrun", 4, tmp_path, task, "wire")
    assert found["losses"] == four["losses"]
    assert "ddp" not in found or found["ddp"] == four["ddp"]


@full
@pytest.mark.parametrize("launcher", ["mpich", "impi-rt"])
def test_four_ranks_of_mpi(launcher: str, four: Found, tmp_path: Path) -> None:
    assert start(launcher, 4, tmp_path, "launched", "wire")["losses"] == four["losses"]


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [("openmpi", 2), *(pytest.param(name, 4, marks=full) for name in ("openmpi", "mpich", "impi-rt"))],
)
def test_given_communicators(launcher: str, ranks: int, openmpi: Found, tmp_path: Path) -> None:
    """A world of two ranks in a job of two; two such worlds in a job of four."""
    assert start(launcher, ranks, tmp_path, "comm", "wire")["losses"] == openmpi["losses"]


@pytest.mark.parametrize(
    "launcher", ["torchrun", pytest.param("mpich", marks=full), pytest.param("impi-rt", marks=full)]
)
def test_a_failing_rank_takes_the_job_down(launcher: str) -> None:
    begin = time.monotonic()
    result = watch([*command(launcher, 2), FAILING, "main"], timeout=90)
    assert result.returncode != 0 and not result.timed_out and not result.leftovers
    assert "[rank 1 of 2 on" in result.stderr and "ValueError: broken in main" in result.stderr
    assert time.monotonic() - begin < 60


def test_the_wrong_mpirun_is_told() -> None:
    """MPICH's launcher with the mpi4py that loads Open MPI: every rank would be alone."""
    mpiexec = str(other_mpi("mpich") / "mpiexec")
    result = watch([mpiexec, "-n", "2", sys.executable, "-c", "import triloom; triloom.init()"], timeout=60)
    assert result.returncode != 0 and not result.timed_out
    assert "mpich started 2 ranks, but mpi4py's MPI sees 1" in result.stderr
    assert "Open MPI v" in result.stderr and "python -m mpi4py --mpi-lib-version" in result.stderr
