"""What a group needs of its transport: nonblocking bytes by address, tags; and reusable header slots."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from .fingerprint import HEADER_BYTES
from .progress import Pending

INLINE_BYTES = 16 << 10
"""A transfer up to this size travels with its header; a larger one is not copied on its way."""
ROW_BYTES = HEADER_BYTES + INLINE_BYTES
_SLOT_BYTES = 128 << 10
_LEAST_INLINE_BYTES = 1 << 10

HEADER, SEND_HEADER, RECV_HEADER = 1, 2, 3
HEADERS = (HEADER, SEND_HEADER, RECV_HEADER)
"""Tags of messages that are matched by their order."""
SCATTER, GATHER, TRANSFER = 0, 1, 2
"""Phases with data; their tags carry the sequence number, as operations reach them in any order."""
_FIRST_DATA_TAG = 8
_PHASES = 4


class Wire(ABC):
    """The ranks of a transport, seen from one of them. Messages of a sender and tag arrive in order.

    A message may be shorter than what its receiver makes room for. Requests have ``Test()``, true once
    complete (it raises if the transport failed), and those of ``recv_init`` ``Start()`` and ``Free()``.
    """

    def __init__(self, rank: int, size: int, *, highest_tag: int) -> None:
        self.rank = rank
        self.size = size
        self.peers = [(rank + i) % size for i in range(1, size)]
        self.inline_bytes = max(_LEAST_INLINE_BYTES, _SLOT_BYTES // size)
        """A rank's input to a collective up to this size goes to every rank with the header: one exchange is
        enough then, for p/2 times the bytes of a large operation (measured: the better way up to 64 KiB at p=2)."""
        self.piece_bytes = 1 << 30
        """Longest single message: MPI counts in C ints."""
        self._window = (highest_tag - _FIRST_DATA_TAG) // _PHASES

    @abstractmethod
    def isend(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        """A request; the memory belongs to it until it is complete."""

    @abstractmethod
    def irecv(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        """A request; the memory belongs to it until it is complete."""

    @abstractmethod
    def recv_init(self, address: int, nbytes: int, peer: int, tag: int) -> Any:
        """A request that receives each time it is started."""

    def look(self) -> None:
        """Let the transport notice what became of the job; called now and then while nothing else calls it."""
        return

    @abstractmethod
    def unexpected(self, peer: int) -> list[tuple[int, bytes]]:
        """Take the headers that came from a peer and that no operation here waits for, as ``(tag, header)``.

        Only for the text of an error: a transport that cannot look gives none.
        """

    @abstractmethod
    def split(self, color: int | None, key: int) -> Wire | None:
        """The wire of the ranks with the same color, ordered by key; None for color None. Collective."""

    @abstractmethod
    def close(self) -> None:
        """Release the transport's resources; nothing is under way on any rank."""

    @abstractmethod
    def memory(self, address: int, nbytes: int) -> Any:
        """A writable buffer over memory that the caller keeps alive."""

    def tag(self, seq: int, phase: int) -> int:
        return _FIRST_DATA_TAG + (seq % self._window) * _PHASES + phase

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy host memory by address."""
        if nbytes:
            self.memory(target, nbytes)[:] = self.memory(source, nbytes)

    def send(self, pending: Pending, tensor: torch.Tensor, peer: int, tag: int) -> None:
        """Start sending a contiguous tensor in pieces; nothing is sent for an empty one."""
        begin, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for at in range(0, nbytes, self.piece_bytes):
            pending.append((self.isend(begin + at, min(self.piece_bytes, nbytes - at), peer, tag), peer))

    def recv(self, pending: Pending, tensor: torch.Tensor, peer: int, tag: int) -> None:
        """Counterpart of :meth:`send`."""
        begin, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for at in range(0, nbytes, self.piece_bytes):
            pending.append((self.irecv(begin + at, min(self.piece_bytes, nbytes - at), peer, tag), peer))


class Slot:
    """One row per rank of a group: its header and inline payload. The own row is what is sent."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        row = HEADER_BYTES + wire.inline_bytes
        self.data = torch.zeros(wire.size * row, dtype=torch.uint8)
        self.begin = self.data.data_ptr()
        self.rows = [wire.memory(self.begin + r * row, row) for r in range(wire.size)]
        self.own = self.begin + wire.rank * row
        self.receives = [(wire.recv_init(self.begin + p * row, row, p, HEADER), p) for p in wire.peers]
        self.payloads = [self.begin + r * row + HEADER_BYTES for r in range(wire.size)]
        """Addresses of the inline payloads, in rank order."""

    def post(self, header: bytes, payload: int, nbytes: int) -> Pending:
        """Send header and payload (an address) to every peer, start receiving theirs; returns the sends."""
        row = self.rows[self.wire.rank]
        row[:HEADER_BYTES] = header
        if nbytes:
            row[HEADER_BYTES : HEADER_BYTES + nbytes] = self.wire.memory(payload, nbytes)
        for request, _ in self.receives:
            request.Start()
        isend, own, total = self.wire.isend, self.own, HEADER_BYTES + nbytes
        return [(isend(own, total, p, HEADER), p) for p in self.wire.peers]

    def free(self) -> None:
        """Free the persistent requests (none is active)."""
        for request, _ in self.receives:
            request.Free()
