"""Files that MPI names in /dev/shm: found when nobody uses them, and unnamed while they are in use."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triloom import leftovers
from triloom.doctor import host
from triloom.leftovers import abandoned, mapped, unname


@pytest.fixture
def folder() -> Iterator[Path]:
    """In /dev/shm, where files of other tests do not matter."""
    with tempfile.TemporaryDirectory(dir=leftovers.SHM, prefix="triloom-test-") as name:
        yield Path(name)


@contextmanager
def used(file: Path) -> Iterator[None]:
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 4096):
        yield


@pytest.mark.parametrize("name", ["sm_segment.host.0.ab.1", "vader_segment.host.0.ab.1", "mpich_shm_0123_0"])
def test_a_file_that_nobody_uses_is_found(folder: Path, name: str) -> None:
    file = folder / name
    file.write_bytes(bytes(4096))
    (folder / "mine.bin").write_bytes(bytes(4096))
    with used(file):
        assert abandoned(folder) == []
        assert mapped(Path("/proc/self")) == {file}
    assert abandoned(folder) == [file]


def test_a_file_that_another_process_uses_is_left_alone(folder: Path) -> None:
    file = folder / "sm_segment.host.0.ab.0"
    file.write_bytes(bytes(4096))
    program = (
        "import mmap, sys\nf = open(sys.argv[1], 'r+b')\nm = mmap.mmap(f.fileno(), 4096)\nprint(flush=True)\ninput()"
    )
    other = subprocess.Popen(
        [sys.executable, "-S", "-c", program, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    assert abandoned(folder) == [] and unname() == set() and file.exists()
    other.communicate(b"\n")
    assert abandoned(folder) == [file]


def test_names_go_and_memory_stays(folder: Path) -> None:
    file, other = folder / "sm_segment.host.0.ab.0", folder / "data.bin"
    for each in (file, other):
        each.write_bytes(bytes(4096))
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 4096) as memory, used(other):
        assert unname() == {file}
        assert not file.exists() and other.exists()
        memory[0] = 7
        assert memory[0] == 7 and unname() == set()


def test_nothing_is_said_of_what_cannot_be_looked_at(tmp_path: Path) -> None:
    assert mapped(Path("/proc/0")) == set() and abandoned(tmp_path / "no such folder") == []


def test_the_doctor_names_them_and_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = None  # looks at the host alone
    monkeypatch.setattr(host, "abandoned", lambda: abandoned(folder))
    assert host.leftovers(place).says == "none"  # type: ignore[arg-type]
    file = folder / "mpich_shm_0123_0"
    file.write_bytes(os.urandom(1 << 20))
    seen = host.leftovers(place)  # type: ignore[arg-type]
    assert seen.says == "1 file of killed MPI jobs: 1 MiB"
    subprocess.run(seen.data["remove"], shell=True, check=True)
    assert not file.exists()
