"""The group of an MPI communicator, and MPI as a Wire."""

from __future__ import annotations

from typing import Any

from ..errors import GroupError
from .fingerprint import HEADER_BYTES
from .wire import HEADERS, INLINE_BYTES, Wire
from .wired import WiredGroup


class MPIWire(Wire):
    """A communicator of its own."""

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI  # whoever holds a communicator has initialised MPI

        super().__init__(comm.Get_rank(), comm.Get_size(), highest_tag=comm.Get_attr(MPI.TAG_UB) or 32767)
        self.comm = comm
        self._address = MPI.buffer.fromaddress
        self._byte = MPI.BYTE
        self._undefined = MPI.UNDEFINED

    def isend(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        return self.comm.Isend([self._address(address, nbytes), self._byte], peer, tag)

    def irecv(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        return self.comm.Irecv([self._address(address, nbytes), self._byte], peer, tag)

    def recv_init(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        return self.comm.Recv_init([self._address(address, nbytes), self._byte], peer, tag)

    def memory(self, address: int, nbytes: int) -> Any:
        return self._address(address, nbytes)

    def look(self) -> None:
        self.comm.Iprobe()  # Open MPI ends this process if its mpirun is gone, but only inside of a call

    def unexpected(self, peer: int) -> list[tuple[int, bytes]]:
        found = []
        for tag in HEADERS:
            message = self.comm.Improbe(peer, tag)
            if message is not None:
                data = bytearray(HEADER_BYTES + max(INLINE_BYTES, self.inline_bytes))
                message.Recv([data, self._byte])
                found.append((tag, bytes(data[:HEADER_BYTES])))
        return found

    def split(self, color: int | None, key: int) -> MPIWire | None:
        comm = self.comm.Split(self._undefined if color is None else color, key)
        return None if color is None else MPIWire(comm)

    def close(self) -> None:
        self.comm.Free()


class MPIGroup(WiredGroup):
    """The ranks of an MPI communicator, which is duplicated: collective over ``comm``.

    Keywords are those of WiredGroup. The progress thread needs MPI_THREAD_SERIALIZED.
    """

    def __init__(self, comm: Any, *, progress_thread: bool = True, **options: Any) -> None:
        from mpi4py import MPI

        if progress_thread and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise GroupError(
                "MPI was initialised without thread support; initialise it with MPI_THREAD_SERIALIZED or "
                "more, or pass progress_thread=False (transfers then move only during waits)"
            )
        super().__init__(MPIWire(comm.Dup()), progress_thread=progress_thread, **options)
