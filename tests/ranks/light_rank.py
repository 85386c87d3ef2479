"""A rank without torch: triloom's segments and engine, and the names of MPI's files; reduces until it is killed.

It makes its segments as triloom.groups.shared_host does, over MPI instead of a group.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from mpi4py import MPI

from triloom import _C, leftovers
from triloom.groups import segments

SIZES = (8 << 10, 64 << 10, 64 << 10)
NUMEL = 1 << 16
FLOAT, ALL_REDUCE, SUM = 0, 0, 0
"""Rows of triloom.native.DTYPE_CODES, of the operations of a segment, and of its reductions."""


def together(comm: MPI.Intracomm, nbytes: int) -> int:
    """A segment of all ranks."""
    fd = segments.create(nbytes) if comm.rank == 0 else -1
    pid, number = comm.bcast((os.getpid(), fd))
    return fd if comm.rank == 0 else segments.attach(pid, number)


def say(*words: str) -> None:
    """A line in one piece: the ranks' outputs are mixed."""
    os.write(1, f"{' '.join(words)}\n".encode())


def main() -> None:
    comm = MPI.COMM_WORLD
    comm.Barrier()
    named = sorted(map(str, leftovers.mapped(Path("/proc/self"))))
    leftovers.unname()
    layout = (comm.size, *SIZES)
    pids = comm.allgather(os.getpid())
    engine = _C.ShmEngine(together(comm, _C.ShmEngine.bells_bytes(comm.size)), comm.rank, pids, 0.0)
    bells = list(range(comm.size))
    fd = together(comm, _C.ShmChannel.total_bytes(layout))
    channel = _C.ShmChannel(engine, fd, layout, comm.rank, bells, True)
    x = (ctypes.c_float * NUMEL)()
    comm.Barrier()
    say("up", str(os.getpid()), *named)
    rounds = int(sys.argv[1])
    while rounds != 0:
        rounds -= 1
        comm.Iprobe()  # Open MPI ends this process if its mpirun is gone, but only inside of a call
        for i in (0, NUMEL - 1):
            x[i] = comm.rank + 1.0
        op = _C.ShmOp(b"same", ALL_REDUCE, FLOAT, SUM, 0, False, True, ctypes.addressof(x), ctypes.addressof(x), NUMEL)
        assert engine.wait(channel.collective(op), 30) == 1
        assert x[0] == x[NUMEL - 1] == comm.size * (comm.size + 1) / 2
    say("done")


if __name__ == "__main__":
    main()
