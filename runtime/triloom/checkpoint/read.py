"""Reading a checkpoint: the manifest, and byte ranges of the files, checked block by block as they come.

Nothing but JSON and bytes at offsets is read: nothing in a file can run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..errors import CheckpointError
from ..parts import Meeting, Part, local_shape, meet, runs
from .disk import crc32c, explained, scatter
from .manifest import BLOCK, DTYPES, NAME, Manifest, Stored, Tensor, from_text

T = TypeVar("T")

THREADS = 4
"""Reads under way at a time."""


class Want(NamedTuple):
    """Elements ``part`` of a tensor, to be put into ``into``: flat, contiguous, on the CPU."""

    tensor: str
    part: Part
    into: torch.Tensor


def read_manifest(folder: Path) -> Manifest:
    """Raises CheckpointError if there is none, or it is damaged."""
    with explained("cannot read", folder / NAME):
        try:
            text = (folder / NAME).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no {NAME}: it is not a checkpoint, or not a complete one") from None
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder}: {NAME} is damaged") from None
    try:
        return from_text(text, crc32c)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None


def read(folder: Path, manifest: Manifest, wants: Sequence[Want]) -> None:
    """Fill every ``into``, reading what that takes and no more (in blocks of BLOCK bytes, each of which is checked).

    Raises CheckpointError for a file that is missing, shorter or longer than it was, or damaged, and for a tensor that
    is not there.
    """
    tasks = [task for want in wants for task in _tasks(manifest, want)]
    items = [(task, block) for task in tasks for block in task.blocks()]
    with _opened(folder, manifest, {t.stored.file for t in tasks}) as fds:
        buffers = _Buffers()
        _each(items, lambda item: item[0].take(item[1], folder, fds, buffers))


def read_tensor(folder: Path, manifest: Manifest, name: str) -> torch.Tensor:
    """A whole tensor in its global shape."""
    tensor = _find(manifest, name)
    dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype][0])
    flat = torch.empty(math.prod(tensor.shape), dtype=dtype)
    read(folder, manifest, [Want(name, Part(0, flat.numel()), flat)])
    return flat.view(tensor.shape)


def verify(folder: Path) -> Manifest:
    """Read everything; raises CheckpointError naming the first file that is missing or damaged, and the tensor."""
    manifest = read_manifest(folder)
    blocks = [
        _Block(name, stored, block, t.itemsize)
        for name, t in manifest.tensors.items()
        for stored in t.pieces
        for block in range(len(stored.checksums))
    ]
    buffers = _Buffers()
    with _opened(folder, manifest, set(manifest.files)) as fds:

        def check(block: _Block) -> None:
            with buffers.one(block.nbytes) as buffer:
                block.read(folder, fds, buffer)

        _each(blocks, check)
    return manifest


# ---------------------------------------------------------------- one block


class _Buffers:
    """Buffers that threads use again and again: fresh memory costs more than a read from the page cache."""

    def __init__(self) -> None:
        self._free: SimpleQueue[bytearray] = SimpleQueue()

    @contextmanager
    def one(self, nbytes: int) -> Iterator[memoryview]:
        """At most BLOCK bytes."""
        try:
            buffer = self._free.get_nowait()
        except Empty:
            buffer = bytearray()
        if len(buffer) < nbytes:
            buffer = bytearray(nbytes)
        try:
            yield memoryview(buffer)[:nbytes]
        finally:
            self._free.put(buffer)


class _Block(NamedTuple):
    """One block of a stored piece."""

    tensor: str
    stored: Stored
    number: int
    itemsize: int

    @property
    def nbytes(self) -> int:
        return min(BLOCK, self.stored.part.numel * self.itemsize - self.number * BLOCK)

    def read(self, folder: Path, fds: Mapping[str, int], into: memoryview) -> None:
        """Fill ``into`` and check it."""
        path, at = folder / self.stored.file, self.stored.offset + self.number * BLOCK
        with explained("cannot read", path):
            got = _pread(fds[self.stored.file], into, at)
        if got < len(into):
            raise CheckpointError(f"{path} ends {len(into) - got} bytes too early, in {self.tensor}: it is damaged")
        if crc32c(into) != self.stored.checksums[self.number]:
            raise CheckpointError(
                f"{path} is damaged: bytes {at} to {at + len(into)}, of {self.tensor}, do not match their checksum"
            )


@dataclass(frozen=True)
class _Task:
    """What one stored piece gives to one wanted one."""

    want: Want
    stored: Stored
    meeting: Meeting
    """Elements (one: in ``want.into``, two: in the stored piece), ascending in the stored piece."""
    itemsize: int

    def blocks(self) -> list[int]:
        """Those of the stored piece that hold something wanted."""
        per = BLOCK // self.itemsize
        first, last = self.meeting.two // per, (self.meeting.two + self.meeting.length - 1) // per
        touched = np.zeros(len(self.stored.checksums) + 1, np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last + 1, -1)
        found: list[int] = np.flatnonzero(np.cumsum(touched)[:-1]).tolist()
        return found

    def take(self, number: int, folder: Path, fds: Mapping[str, int], buffers: _Buffers) -> None:
        """Read a block and put what is wanted of it where it belongs."""
        block = _Block(self.want.tensor, self.stored, number, self.itemsize)
        lo = number * (BLOCK // self.itemsize)
        hi = lo + block.nbytes // self.itemsize
        one, two, length = self.meeting
        inside = slice(int(np.searchsorted(two + length, lo, "right")), int(np.searchsorted(two, hi, "left")))
        one, two, length = one[inside], two[inside], length[inside]
        skip = np.maximum(lo - two, 0)
        one, two, length = one + skip, two + skip, np.minimum(two + length, hi) - two - skip
        if len(one) == 1 and length[0] == hi - lo:  # all of it, in a row: no copy
            at = int(one[0]) * self.itemsize
            block.read(folder, fds, _memory(self.want.into)[at : at + block.nbytes])
            return
        with buffers.one(block.nbytes) as data:
            block.read(folder, fds, data)
            scatter(self.want.into, data, Meeting(one, two - lo, length), self.itemsize)


def _memory(flat: torch.Tensor) -> memoryview:
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _find(manifest: Manifest, name: str) -> Tensor:
    if name not in manifest.tensors:
        raise CheckpointError(f"the checkpoint holds no {name}")
    return manifest.tensors[name]


def _tasks(manifest: Manifest, want: Want) -> Iterator[_Task]:
    tensor = _find(manifest, want.tensor)
    mine = runs(tensor.shape, want.part)
    found = 0
    for stored in tensor.pieces:
        apart = stored.part.stop <= want.part.start or want.part.stop <= stored.part.start
        if apart and stored.part.dim == want.part.dim and stored.part.slices == want.part.slices:
            continue  # other ranges of the same local tensor
        meeting = meet(mine, runs(tensor.shape, stored.part))
        if len(meeting.length):
            found += int(meeting.length.sum())
            order = np.argsort(meeting.two, kind="stable")
            yield _Task(want, stored, Meeting(*(a[order] for a in meeting)), tensor.itemsize)
    if found != want.part.numel:
        where = local_shape(tensor.shape, want.part)
        raise CheckpointError(f"{want.tensor}: {want.part.numel} elements of {where} wanted, the pieces have {found}")


def _pread(fd: int, into: memoryview, offset: int) -> int:
    done = 0
    while done < len(into):
        got = os.preadv(fd, [into[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


# ---------------------------------------------------------------- files


@contextmanager
def _opened(folder: Path, manifest: Manifest, names: set[str]) -> Iterator[Mapping[str, int]]:
    """File descriptors by name; every file has its size and its header."""
    with ExitStack() as stack:
        fds: dict[str, int] = {}
        for name in sorted(names):
            path = folder / name
            with explained("cannot read", path):
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
            fds[name] = fd
            stack.callback(os.close, fd)
            size, said = os.fstat(fd).st_size, manifest.files[name].bytes
            if size != said:
                raise CheckpointError(f"{path} has {size} bytes, {said} were written: it is damaged")
            _check_header(folder, manifest, name, fd)
        yield fds


def _check_header(folder: Path, manifest: Manifest, name: str, fd: int) -> None:
    file = manifest.files[name]
    header = memoryview(bytearray(file.header))
    with explained("cannot read", folder / name):
        got = _pread(fd, header, 0)
    if got < file.header or crc32c(header) != file.checksum:
        raise CheckpointError(f"{folder / name} is damaged: its header does not match its checksum")


def _each(items: Sequence[T], work: Callable[[T], None]) -> None:
    """``work`` of every item, a few at a time; the first error ends the rest."""
    if len(items) < 2:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
