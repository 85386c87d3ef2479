"""Files in /dev/shm that MPI libraries name, and what to do so that no job leaves them behind. Pure but for /proc.

triloom's own segments have no names. Those of Open MPI and MPICH do: MPI_Finalize removes them, and mpirun when a
rank dies, but nobody when mpirun is killed outright. All ranks of a host have mapped them when MPI_Init returns, so
that their names can go then, and the memory with its last process. What remains is a job that is killed inside of
MPI_Init: ``abandoned`` finds its files, and ``triloom doctor`` names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

SHM = Path("/dev/shm")
NAMES = ("sm_segment.*", "vader_segment.*", "mpich_shm_*", "Intel_MPI_*")
"""Open MPI 5 and 4, MPICH, Intel MPI."""


def mapped(process: Path) -> set[Path]:
    """The files of MPI that a process (its folder in /proc) has mapped; none if it cannot be looked at."""
    found = set()
    with suppress(OSError):
        for line in (process / "maps").read_text().splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and _of_mpi(Path(words[5])):
                found.add(Path(words[5]))
    return found


def unname() -> set[Path]:
    """Remove the names of the files of MPI that this process has mapped; those it removed.

    For a rank whose program did not initialise MPI itself, once all ranks of its host have come out of MPI_Init.
    Processes that MPI starts later (MPI_Comm_spawn) cannot share memory with these ranks any more.
    """
    removed = set()
    for file in mapped(Path("/proc/self")):
        with suppress(OSError):  # another rank was faster, or the file is another user's
            file.unlink()
            removed.add(file)
    return removed


def abandoned(folder: Path = SHM) -> list[Path]:
    """Files of MPI that belong to this user and that no process has mapped: of jobs that were killed."""
    files = {file for file in _files(folder) if _of_mpi(file) and _is_mine(file)}
    if files:
        for process in Path("/proc").iterdir():
            if process.name.isdigit():
                files -= mapped(process)
    return sorted(file for file in files if file.exists())


def _files(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from folder.iterdir()


def _is_mine(file: Path) -> bool:
    with suppress(OSError):
        return file.stat().st_uid == os.geteuid()
    return False


def _of_mpi(file: Path) -> bool:
    return file.is_relative_to(SHM) and any(fnmatch(file.name, name) for name in NAMES)
