"""Host memory that operations borrow: reused buffers, and pinned copies of GPU tensors.

Fresh memory is slow to touch first, so buffers go back to a pool and are handed out again. A GPU
tensor travels through a pinned host copy; everything the MPI group does about streams is here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch

_KEEP_BYTES = 256 << 20
"""Free memory a pool holds on to."""


@dataclass(eq=False)
class Buffer:
    """Bytes on the host. ``busy``: a GPU copy that must have ended before the buffer is used again."""

    data: torch.Tensor
    busy: torch.cuda.Event | None = None

    def view(self, dtype: torch.dtype, numel: int) -> torch.Tensor:
        return self.data[: numel * dtype.itemsize].view(dtype)

    def idle(self) -> bool:
        return self.busy is None or bool(self.busy.query())  # type: ignore[no-untyped-call]


class HostPool:
    """Reuses host buffers of similar size; thread-safe."""

    def __init__(self, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._free: list[Buffer] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Buffer:
        """A buffer of at least ``nbytes``, the smallest free one of at most twice that if there is one."""
        with self._lock:
            fits = [b for b in self._free if nbytes <= b.data.numel() <= 2 * nbytes and b.idle()]
            if fits:
                best = min(fits, key=lambda b: b.data.numel())
                self._free.remove(best)
                best.busy = None
                return best
        rounded = max(4096, -(-nbytes // 4096) * 4096)
        return Buffer(torch.empty(rounded, dtype=torch.uint8, pin_memory=self._pinned))

    def give(self, buffer: Buffer) -> None:
        with self._lock:
            self._free.append(buffer)
            while len(self._free) > 1 and sum(b.data.numel() for b in self._free) > _KEEP_BYTES:
                oldest = self._free.pop(0)
                if oldest.busy is not None:
                    oldest.busy.synchronize()


class GpuCopies:
    """Pinned host copies of the tensors of operations on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(pinned=True)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def stage(self, output: torch.Tensor | None, input: torch.Tensor | None, in_place: bool) -> GpuStage:
        """Host counterparts of an operation's flat tensors; ``input`` starts its way on the current stream.

        ``in_place``: output and input are the same tensor and get one host copy.
        """
        host_in = host_out = None
        buffers: list[Buffer] = []
        if input is not None:
            buffers.append(self.pool.take(input.numel() * input.element_size()))
            host_in = buffers[-1].view(input.dtype, input.numel())
            host_in.copy_(input, non_blocking=True)
        if output is not None and in_place:
            host_out = host_in
        elif output is not None:
            buffers.append(self.pool.take(output.numel() * output.element_size()))
            host_out = buffers[-1].view(output.dtype, output.numel())
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(self.device))
        return GpuStage(self, output, host_out, host_in, ready, buffers)


@dataclass(eq=False)
class GpuStage:
    """One operation's host tensors and the events that order them with the streams of the GPU."""

    copies: GpuCopies
    output: torch.Tensor | None
    host_out: torch.Tensor | None
    host_in: torch.Tensor | None
    ready: torch.cuda.Event
    """Recorded at issue: the host copy of the input is complete, and the output may be overwritten."""
    buffers: list[Buffer] = field(default_factory=list)
    copied: torch.cuda.Event | None = None
    """Recorded after the copy back."""

    def Test(self) -> bool:
        """True once the input is on the host; named like an MPI request, beside which it is polled."""
        return bool(self.ready.query())  # type: ignore[no-untyped-call]

    def copy_back(self) -> None:
        """Start the result's way to the GPU, on a stream of its own; called from any thread."""
        if self.output is not None and self.host_out is not None:
            stream = self.copies.stream
            with torch.cuda.device(self.copies.device), torch.cuda.stream(stream):
                stream.wait_event(self.ready)
                self.output.copy_(self.host_out, non_blocking=True)
                self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self.copied.record(stream)

    def release(self) -> None:
        """Give the host buffers back, once MPI does not use them any more."""
        for buffer in self.buffers:
            buffer.busy = self.copied or self.ready
            self.copies.pool.give(buffer)
        self.buffers = []

    def arrived(self) -> bool:
        return self.copied is None or bool(self.copied.query())  # type: ignore[no-untyped-call]

    def order(self) -> None:
        """Make the current stream wait for the copy back."""
        if self.copied is not None:
            torch.cuda.current_stream(self.copies.device).wait_event(self.copied)
