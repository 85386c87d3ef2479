"""Files of token ids: flat ones, and Megatron's pairs of ``.bin`` and ``.idx``. Mapped, never read whole.

Megatron's index, little-endian: ``MMIDIDX\\0\\0``, version 1 (uint64), a code for the dtype (uint8), the number of
sequences and of document bounds (uint64 each), then for each sequence its length in tokens (int32), for each its
place in the ``.bin`` in bytes (int64), and the document bounds, indices of sequences (int64). A multimodal index
goes on with a mode for each sequence (int8). Source: the format as Megatron-LM's IndexedDataset writes it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from .tokens import Documents, Flat, Ids, Indices, Tokens

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
CODES: Mapping[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Dtype of the tokens by the index's code; 6 and 7 are floating point."""


def open_flat(path: Path, dtype: str) -> Flat:
    """The token ids of a file without a header, of ``dtype`` (little-endian).

    Raises ConfigError for a file that is empty or does not hold whole ids.
    """
    return Flat(_map(path, np.dtype(dtype).newbyteorder("<"), f"data.token_dtype = {dtype}"))


def _map(path: Path, dtype: np.dtype[np.generic], said_by: str) -> Ids:
    size = _size(path)
    if not size:
        raise ConfigError(f"{path} is an empty file; give one with tokens")
    if size % dtype.itemsize:
        raise ConfigError(
            f"{path} has {size} bytes, not a multiple of the {dtype.itemsize} of {said_by}; it is cut short, "
            "or of another dtype"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def open_megatron(prefix: Path, eos: int | None = None) -> Tokens:
    """The tokens of ``prefix.bin`` as ``prefix.idx`` describes them, all documents one after the other.

    eos: token put after every document, None for none. Raises ConfigError where the two do not fit together.
    """
    bin_path, idx_path = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; Megatron's data is a .bin and an .idx of the same name")
    dtype, lengths, pointers, bounds = read_index(idx_path)
    tokens = _map(bin_path, np.dtype(dtype).newbyteorder("<"), f"{idx_path.name}, {np.dtype(dtype)}")
    ends = np.cumsum(lengths, dtype=np.int64)
    _check_index(idx_path, lengths, pointers, bounds, ends, tokens)
    if eos is None:
        return Flat(tokens)
    last = bounds[1:]  # bounds[d + 1] is the first sequence after document d
    return Documents.of(tokens, np.concatenate(([0], ends))[last], eos)


def read_index(path: Path) -> tuple[type[np.integer], Indices, Indices, Indices]:
    """Dtype of the tokens; lengths and byte offsets of the sequences; document bounds. Mapped, not copied."""
    size = _size(path)
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise ConfigError(f"{path} is not a Megatron index: it does not begin with {MAGIC!r} and a whole header")
    _, version, code, sequences, documents = HEADER.unpack(head)
    if version != 1:
        raise ConfigError(f"{path} is a Megatron index of version {version}; only version 1 is known")
    if code not in CODES:
        raise ConfigError(f"{path} has dtype code {code}; token ids have one of {', '.join(map(str, CODES))}")
    need = HEADER.size + 12 * sequences + 8 * documents
    if size not in (need, need + sequences):
        raise ConfigError(
            f"{path} has {size} bytes, but {sequences} sequences and {documents} document bounds take {need}; "
            "it is cut short or damaged"
        )
    bytes_ = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    at = HEADER.size
    lengths = bytes_[at : at + 4 * sequences].view("<i4")
    pointers = bytes_[at + 4 * sequences : at + 12 * sequences].view("<i8")
    return CODES[code], lengths, pointers, bytes_[at + 12 * sequences : need].view("<i8")


def _check_index(path: Path, lengths: Indices, pointers: Indices, bounds: Indices, ends: Indices, tokens: Ids) -> None:
    if not len(lengths) or lengths.min() < 0:
        raise ConfigError(f"{path} holds no sequences, or one of negative length; it is damaged")
    wrong = np.flatnonzero(pointers != (ends - lengths) * tokens.itemsize)
    if wrong.size:
        i = int(wrong[0])
        raise ConfigError(
            f"{path} says that sequence {i} begins at byte {pointers[i]}, but those before it take "
            f"{(ends[i] - lengths[i]) * tokens.itemsize}; sequences must follow each other"
        )
    if ends[-1] != len(tokens):
        raise ConfigError(
            f"{path} describes {ends[-1]} tokens, but its .bin holds {len(tokens)}; one of the two is cut short, "
            "or they are not a pair"
        )
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        raise ConfigError(f"{path}: the document bounds must ascend from 0 to its {len(lengths)} sequences")


def with_suffix(prefix: Path, suffix: str) -> Path:
    """``prefix`` with ``suffix`` put behind it; prefixes of Megatron's files may have dots of their own."""
    return prefix.with_name(prefix.name + suffix)
