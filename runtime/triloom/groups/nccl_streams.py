"""The CUDA streams of a NCCL group: everything it knows about streams and events is here.

A group has one stream of its own. An operation starts when what the caller had queued on the
current stream is done, and waiting for it makes the current stream wait, never the host.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from .. import _C

Mark = Any
"""A point in a stream (an event)."""

THREAD_LOCAL = 1


class Streams(Protocol):
    """What a NCCL group needs of a device."""

    device: torch.device
    address: int
    """The own stream, as NCCL takes it."""

    def identity(self) -> str:
        """Names the physical device on its host."""

    def enter(self) -> None:
        """The own stream waits for what is queued on the current stream."""

    def scope(self) -> AbstractContextManager[Any]:
        """torch operations inside run on the own stream."""

    def mark(self) -> Mark:
        """The point the own stream has reached."""

    def reached(self, mark: Mark) -> bool:
        """Whether the own stream has passed the mark; not while capturing."""

    def order(self, mark: Mark) -> None:
        """The current stream waits for the mark."""

    def capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph."""

    def watching(self) -> None:
        """Called once by a thread that will ask ``reached`` at any time, also while others capture."""

    def fork(self) -> Streams:
        """The same device with another stream of its own."""


class CudaStreams:
    """Streams of one GPU. ``stream``: the group's own; None makes one, of high priority."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        own = stream or torch.cuda.Stream(self.device, priority=-1)  # type: ignore[no-untyped-call]
        self._stream: torch.cuda.Stream = own
        self.address: int = self._stream.cuda_stream

    def identity(self) -> str:
        return str(torch.cuda.get_device_properties(self.device).uuid)

    def enter(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def scope(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream)

    def mark(self) -> Mark:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def reached(self, mark: Mark) -> bool:
        return bool(mark.query())

    def order(self, mark: Mark) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def watching(self) -> None:
        torch.cuda.set_device(self.device)
        # torch captures in the mode in which CUDA refuses queries of events from any thread: not from this one.
        _C.exchange_capture_mode(THREAD_LOCAL)

    def fork(self) -> CudaStreams:
        return CudaStreams(self.device)
