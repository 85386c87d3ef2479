"""Bytes to and from a disk: checked wrappers of the native writer, and errors that say what to do."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import _C
from ..errors import CheckpointError
from ..parts import Meeting

CHUNK = 1 << 20
"""Bytes of one write."""
THREADS = 8
"""Writes under way at a time, of one rank."""
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


def crc32c(data: bytes | memoryview | bytearray) -> int:
    """CRC32C of contiguous bytes."""
    array = np.frombuffer(data, dtype=np.uint8)
    return _C.crc32c(array.ctypes.data, array.size, 0)


def write_file(
    path: Path, spans: Sequence[torch.Tensor], extents: Sequence[tuple[int, int]], *, direct: bool = True
) -> tuple[list[int], bool]:
    """Write the spans (contiguous CPU tensors) one after the other and force them to disk.

    extents: (offset, bytes) in the file, each inside one span. Returns the CRC32C of each, and whether the page cache
    was passed by. Raises OSError.
    """
    for t in spans:
        if t.device.type != "cpu" or not t.is_contiguous():
            raise TypeError(f"a span must be contiguous and on the CPU, got {tuple(t.shape)} on {t.device}")
    where = [(t.data_ptr(), t.nbytes) for t in spans]
    return _C.write_file(str(path), where, extents, THREADS, CHUNK, direct)


def scatter(target: torch.Tensor, source: memoryview, meeting: Meeting, itemsize: int) -> None:
    """Copy the elements of ``meeting`` (one: in target, two: in source)."""
    to, here, length = (np.ascontiguousarray(a * itemsize) for a in meeting)
    starts, ends = np.minimum(to, here), (here + length).max(initial=0)
    if starts.min(initial=0) < 0 or ends > len(source) or (to + length).max(initial=0) > target.nbytes:
        raise ValueError("elements outside a buffer")
    array = np.frombuffer(source, dtype=np.uint8)
    _C.scatter(target.data_ptr(), array.ctypes.data, to.ctypes.data, here.ctypes.data, length.ctypes.data, len(to))


class Staging:
    """A buffer of the host that is kept from save to save, page-aligned, and pinned where a GPU copies into it.

    Its pages are touched once, when it is made or grows: fresh memory costs more than the copy into it.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._pinned = False
        self._making: threading.Thread | None = None
        self.tensor = torch.empty(0, dtype=torch.uint8)

    def prepare(self, nbytes: int, device: torch.device) -> None:
        """Make room in the background, so that the first to need it does not wait."""
        self._making = threading.Thread(target=self._grow, args=(nbytes, device), name="triloom-staging")
        self._making.start()

    def room(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """uint8 of at least ``nbytes``, a multiple of the page."""
        self._settle()
        self._grow(nbytes, device)
        return self.tensor

    def _settle(self) -> None:
        if self._making is not None:
            self._making.join()
            self._making = None

    def _grow(self, nbytes: int, device: torch.device) -> None:
        if self.tensor.numel() < nbytes:
            self._free()
            size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
            self._map = mmap.mmap(-1, size)
            self.tensor = torch.frombuffer(self._map, dtype=torch.uint8)
            self.tensor.zero_()
            if device.type == "cuda":
                _pin(self.tensor)
                self._pinned = True

    def close(self) -> None:
        """Give the memory back."""
        self._settle()
        self._free()

    def _free(self) -> None:
        if self._pinned:
            _unpin(self.tensor)
            self._pinned = False
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._map = None  # freed with its last view


def _pin(tensor: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, PORTABLE))


def _unpin(tensor: torch.Tensor) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    torch.cuda.check_error(runtime.cudaHostUnregister(tensor.data_ptr()))


def copy_in(target: torch.Tensor, pieces: Sequence[tuple[int, torch.Tensor]]) -> None:
    """Copy flat tensors to byte offsets of ``target``; done when it returns."""
    host = [(target.data_ptr() + at, t.data_ptr(), t.nbytes) for at, t in pieces if t.device.type == "cpu"]
    _C.copy_past_cache(host)
    devices = set()
    for at, t in pieces:
        if t.device.type != "cpu":
            target[at : at + t.nbytes].view(t.dtype).copy_(t, non_blocking=True)
            devices.add(t.device)
    for device in sorted(devices, key=str):
        torch.cuda.current_stream(device).synchronize()


# ---------------------------------------------------------------- errors


@contextmanager
def explained(what: str, path: Path, needed: int | None = None) -> Iterator[None]:
    """OSErrors become CheckpointErrors with the path, the bytes needed and free, and what to do."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(explain(what, path, error, needed)) from error


def explain(what: str, path: Path, error: OSError, needed: int | None = None) -> str:
    """Sentence about a failed operation on a file or folder."""
    text = f"{what} {path}: {os.strerror(error.errno) if error.errno else error}"
    if needed is not None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        text += f"; it needs {needed} bytes, {free_bytes(path)} are free"
    return f"{text}; {_WAY_OUT.get(error.errno or 0, 'checkpoint.dir names another folder')}"


_WAY_OUT = {
    errno.ENOSPC: "free some space, keep fewer checkpoints, or write to another disk",
    errno.EDQUOT: "the quota is used up: free some space or keep fewer checkpoints",
    errno.EFBIG: "a file may not be that large here (ulimit -f, or the file system)",
    errno.EROFS: "the file system is read-only: write to another folder",
    errno.EACCES: "the folder may not be written to: change its permissions, or write to another",
    errno.EPERM: "the folder may not be written to: change its permissions, or write to another",
    errno.EIO: "the disk reports an error: do not trust it, write to another",
}


def free_bytes(path: Path) -> int | str:
    """On the file system of ``path``, for this user; "?" if it cannot be asked."""
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return "?"


def sync_folder(path: Path) -> None:
    """Force the entries of a folder to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_text(path: Path, text: str, *, lasting: bool = True) -> None:
    """Make a small file; lasting: force it to disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if lasting:
            os.fsync(file.fileno())
