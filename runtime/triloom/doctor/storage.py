"""Looks at a folder for offloaded state and checkpoints: direct I/O, and io_uring of the kernel."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from .base import Place, Seen, mib

BLOCK = 4096
SYS_IO_URING_SETUP = 425
"""The same number on every architecture of Linux that has it."""
PARAMS_BYTES = 120
"""sizeof(struct io_uring_params)"""


def filesystem(path: Path, mounts: str) -> str:
    """Type of the file system that holds ``path``, from the text of /proc/mounts; "?" if it is not there."""
    best, kind = "", "?"
    for line in mounts.splitlines():
        _, point, this = line.split()[:3]
        point = point.replace("\\040", " ")
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, this
    return kind


def folder(place: Place) -> Seen:
    """Free space and kind of the folder."""
    path = place.folder.resolve(strict=True)
    found = os.statvfs(path)
    kind = filesystem(path, Path("/proc/mounts").read_text())
    free = found.f_bavail * found.f_frsize
    data = {"path": str(path), "filesystem": kind, "free": free, "writable": os.access(path, os.W_OK)}
    return Seen(f"{path} ({kind}), {mib(free)} free{'' if data['writable'] else ', not writable'}", data)


def direct_io(place: Place) -> Seen:
    """Write a block past the page cache and read it back, in a file that is gone afterwards."""
    pattern = bytes(range(256)) * (BLOCK // 256)
    with tempfile.TemporaryDirectory(prefix=".triloom-doctor-", dir=place.folder) as temp, mmap.mmap(-1, BLOCK) as page:
        try:
            fd = os.open(Path(temp, "block"), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        except OSError as error:
            return Seen(f"refused: {error.strerror}", {"works": False})
        try:
            page[:] = pattern
            written = os.write(fd, page)
            page[:] = bytes(BLOCK)
            read = os.preadv(fd, [page], 0)
            works = written == read == BLOCK and page[:] == pattern
        except OSError as error:
            return Seen(f"opens, but fails: {error.strerror}", {"works": False})
        finally:
            os.close(fd)
    return Seen("reads and writes" if works else "a block came back changed", {"works": works})


def io_uring(place: Place) -> Seen:
    """Make a ring of one entry and close it."""
    number = setup_ring()
    if number >= 0:
        with suppress(OSError):
            os.close(number)
        return Seen("available", {"works": True, "error": None})
    name = errno.errorcode.get(-number, str(-number))
    return Seen(f"refused: {os.strerror(-number)} ({name})", {"works": False, "error": name})


def setup_ring() -> int:
    """The file descriptor of a new ring, or minus the error number."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    params = (ctypes.c_char * PARAMS_BYTES)()
    found = int(libc.syscall(ctypes.c_long(SYS_IO_URING_SETUP), ctypes.c_uint(1), params))
    return found if found >= 0 else -ctypes.get_errno()
