"""The file of one rank: a safetensors header padded to a block of the disk, and the pieces behind it. Pure.

Pieces lie without gaps, as the format wants, those of large elements first, so that each starts at a multiple of its
element. The header is padded with spaces, which JSON allows, so that the data starts where O_DIRECT can write.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..parts import Part, local_shape
from .manifest import CODES, DTYPES

ALIGN = 4096


class Entry(NamedTuple):
    """A piece to be stored."""

    tensor: str
    dtype: str
    """Torch's name."""
    shape: tuple[int, ...]
    """Of the global tensor."""
    part: Part

    @property
    def code(self) -> str:
        """The dtype's name in the file."""
        return CODES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.part.numel * DTYPES[self.code][1]


@dataclass(frozen=True)
class FileLayout:
    """Where everything of a file goes."""

    header: bytes
    order: tuple[int, ...]
    """The entries as they lie in the file."""
    offsets: tuple[int, ...]
    """First byte of each entry, by entry."""
    nbytes: int


def name_in_file(entry: Entry) -> str:
    """Name of the piece for the safetensors library: the tensor's, with the part if it is not all of it."""
    part = entry.part
    split = "" if part.dim is None else f"|{part.dim}:{','.join(f'{lo}-{hi}' for lo, hi in part.slices)}"
    return entry.tensor + split + ("" if _complete(entry) else f"|{part.start}-{part.stop}")


def lay_out(entries: Sequence[Entry]) -> FileLayout:
    """The file that holds ``entries``, whose names in the file must differ."""
    order = sorted(range(len(entries)), key=lambda i: -DTYPES[entries[i].code][1])
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = [0] * len(entries), 0
    for i in order:
        e = entries[i]
        shape = local_shape(e.shape, e.part) if _complete(e) else (e.part.numel,)
        offsets[i] = at
        at += e.nbytes
        table[name_in_file(e)] = {"dtype": e.code, "shape": list(shape), "data_offsets": [offsets[i], at]}
    if len(table) != len(entries) + 1:
        raise ValueError("two pieces have the same name")
    text = json.dumps(table, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // ALIGN) * ALIGN - 8
    header = struct.pack("<Q", length) + text.ljust(length)
    return FileLayout(header, tuple(order), tuple(len(header) + o for o in offsets), len(header) + at)


def _complete(entry: Entry) -> bool:
    numel = 1
    for n in local_shape(entry.shape, entry.part):
        numel *= n
    return entry.part.start == 0 and entry.part.stop == numel
