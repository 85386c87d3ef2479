"""Reading a checkpoint: the manifest, and byte ranges of the files, checked block by block as they come.

Nothing but JSON and bytes at offsets is read: nothing in a file can run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
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


def check(folder: Path, manifest: Manifest, wants: Iterable[tuple[str, Part]]) -> None:
    """Read and check what :func:`read` would of parts of tensors, and keep nothing.

    Raises CheckpointError for a file that is missing, shorter or longer than it was, or damaged, and for a tensor that
    is not there.
    """
    tasks = [task for tensor, part in wants for task in _tasks(manifest, tensor, part)]
    _check_blocks(folder, manifest, {block for task in tasks for block in task.blocks()})


def read(folder: Path, manifest: Manifest, wants: Sequence[Want]) -> None:
    """Fill every ``into``, reading what that takes and no more (in blocks of BLOCK bytes, each of which is checked).

    Raises as :func:`check` does, and leaves some of them filled then.
    """
    tasks = [(task, w.into) for w in wants for task in _tasks(manifest, w.tensor, w.part)]
    items = [(task, into, block) for task, into in tasks for block in task.blocks()]
    buffers = _Buffers()
    with _opened(folder, manifest, {task.stored.file for task, _ in tasks}) as fds:
        _each(items, lambda item: item[0].take(item[2], item[1], folder, fds, buffers))


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
    blocks = {
        _Block(name, stored, block, t.itemsize)
        for name, t in manifest.tensors.items()
        for stored in t.pieces
        for block in range(len(stored.checksums))
    }
    _check_blocks(folder, manifest, blocks, set(manifest.files))
    return manifest


def _check_blocks(
    folder: Path, manifest: Manifest, blocks: Iterable[_Block], files: AbstractSet[str] = frozenset()
) -> None:
    """In the order in which they lie on the disk. files: whose sizes and headers are checked besides."""
    buffers, order = _Buffers(), sorted(blocks, key=lambda b: (b.stored.file, b.stored.offset, b.number))

    def look(block: _Block) -> None:
        with buffers.one(block.nbytes) as buffer:
            block.read(folder, fds, buffer)

    with _opened(folder, manifest, {b.stored.file for b in order} | files) as fds:
        _each(order, look)


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

    tensor: str
    stored: Stored
    meeting: Meeting
    """Elements (one: in what is wanted, two: in the stored piece), ascending in the stored piece."""
    itemsize: int

    def blocks(self) -> list[_Block]:
        """Those of the stored piece that hold something wanted."""
        per = BLOCK // self.itemsize
        first, last = self.meeting.two // per, (self.meeting.two + self.meeting.length - 1) // per
        touched = np.zeros(len(self.stored.checksums) + 1, np.int64)
        np.add.at(touched, first, 1)
        np.add.at(touched, last + 1, -1)
        numbers = np.flatnonzero(np.cumsum(touched)[:-1]).tolist()
        return [_Block(self.tensor, self.stored, number, self.itemsize) for number in numbers]

    def take(self, block: _Block, into: torch.Tensor, folder: Path, fds: Mapping[str, int], buffers: _Buffers) -> None:
        """Read a block and put what is wanted of it where it belongs."""
        lo = block.number * (BLOCK // self.itemsize)
        hi = lo + block.nbytes // self.itemsize
        one, two, length = self.meeting
        inside = slice(int(np.searchsorted(two + length, lo, "right")), int(np.searchsorted(two, hi, "left")))
        one, two, length = one[inside], two[inside], length[inside]
        skip = np.maximum(lo - two, 0)
        one, two, length = one + skip, two + skip, np.minimum(two + length, hi) - two - skip
        if len(one) == 1 and length[0] == hi - lo:  # all of it, in a row: no copy
            at = int(one[0]) * self.itemsize
            block.read(folder, fds, _memory(into)[at : at + block.nbytes])
            return
        with buffers.one(block.nbytes) as data:
            block.read(folder, fds, data)
            scatter(into, data, Meeting(one, two - lo, length), self.itemsize)


def _memory(flat: torch.Tensor) -> memoryview:
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)


def _find(manifest: Manifest, name: str) -> Tensor:
    if name not in manifest.tensors:
        raise CheckpointError(f"the checkpoint holds no {name}")
    return manifest.tensors[name]


def _tasks(manifest: Manifest, name: str, part: Part) -> Iterator[_Task]:
    tensor = _find(manifest, name)
    mine = runs(tensor.shape, part)
    found = 0
    for stored in tensor.pieces:
        apart = stored.part.stop <= part.start or part.stop <= stored.part.start
        if apart and stored.part.dim == part.dim and stored.part.slices == part.slices:
            continue  # other ranges of the same local tensor
        meeting = meet(mine, runs(tensor.shape, stored.part))
        if len(meeting.length):
            found += int(meeting.length.sum())
            order = np.argsort(meeting.two, kind="stable")
            yield _Task(name, stored, Meeting(*(a[order] for a in meeting)), tensor.itemsize)
    if found != part.numel:
        where = local_shape(tensor.shape, part)
        raise CheckpointError(f"{name}: {part.numel} elements of {where} wanted, the pieces have {found}")


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
def _opened(folder: Path, manifest: Manifest, names: AbstractSet[str]) -> Iterator[Mapping[str, int]]:
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
