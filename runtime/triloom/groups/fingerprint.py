"""What a rank says about the operation it issues, so that ranks can compare before data moves.

A fingerprint is the operation, dtype, length, reduction, root, sequence number and group. Its packed
form is the header that MPI ranks exchange; ranks agree exactly when the packed bytes are equal.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from .base import DTYPES, REDUCE_OPS, ReduceOp

OPS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "barrier", "transfer")
HEADER_BYTES = 64
_MAGIC = 0x7472696C  # "tril"
_LAYOUT = struct.Struct("<IBBBBiqqQ")
PACKED_BYTES = _LAYOUT.size
_PAD = bytes(HEADER_BYTES - PACKED_BYTES)
_OTHER = 255

_OP_CODE = {op: i for i, op in enumerate(OPS)}
_DTYPE_CODE: dict[torch.dtype | None, int] = {dtype: i for i, dtype in enumerate(DTYPES)} | {None: 254}
_DTYPE_NAME = {i: str(dtype).removeprefix("torch.") for i, dtype in enumerate(DTYPES)} | {254: "", _OTHER: "other"}
_REDUCE_CODE: dict[str, int] = {op: i for i, op in enumerate(REDUCE_OPS)} | {"": 254}


class Call(NamedTuple):
    """One operation as issued by one rank.

    numel: elements of the rank's input. root: of a broadcast, else -1. refused: why the rank's own
    check of the arguments failed; such a call moves no data and makes every participant raise.
    """

    op: str
    dtype: torch.dtype | None = None
    numel: int = 0
    reduce: ReduceOp | str = ""
    root: int = -1
    refused: str = ""


def pack(call: Call, seq: int, group_id: int) -> bytes:
    """The 64-byte header of a call."""
    return (
        _LAYOUT.pack(
            _MAGIC,
            _OP_CODE[call.op],
            _DTYPE_CODE.get(call.dtype, _OTHER),
            _REDUCE_CODE.get(call.reduce, _OTHER),
            1 if call.refused else 0,
            call.root,
            call.numel,
            seq,
            group_id,
        )
        + _PAD
    )


def describe_header(header: bytes | memoryview) -> str:
    """Text of a packed call, e.g. ``all_reduce float32[1000] sum #17``; works on garbage too."""
    magic, op, dtype, reduce, refused, root, numel, seq, _group = _LAYOUT.unpack_from(header)
    if magic != _MAGIC or op >= len(OPS):
        return f"no triloom header ({bytes(header[:8]).hex()}...)"
    words = [OPS[op]]
    if dtype != 254:
        words.append(f"{_DTYPE_NAME.get(dtype, 'other')}[{numel}]")
    if reduce != 254:
        words.append(REDUCE_OPS[reduce] if reduce < len(REDUCE_OPS) else "unknown-reduction")
    if OPS[op] == "broadcast":
        words.append(f"root {root}")
    words.append(f"#{seq}")
    if refused:
        words.append("(refused there: its own arguments do not fit together)")
    return " ".join(words)


def describe(call: Call, seq: int) -> str:
    return describe_header(pack(call._replace(refused=""), seq, 0))


def group_id(name: str, members: Iterable[int]) -> int:
    """Stable 63-bit id of a group, the same on all its members."""
    text = f"{name}|{','.join(map(str, members))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def mismatch_text(group: str, said: Mapping[int, str], members: tuple[int, ...]) -> str:
    """Message of a MismatchError; ``said`` maps group ranks to descriptions. Ranks that agree share a line."""
    by_text: dict[str, list[int]] = {}
    for rank in sorted(said):
        by_text.setdefault(said[rank], []).append(rank)
    sides = "; ".join(f"{rank_list(ranks, members)}: {text}" for text, ranks in by_text.items())
    return (
        f"ranks of group {group!r} issued different operations: {sides}. No buffer was changed. "
        "Every rank must issue the same operations of a group in the same order"
    )


def rank_list(ranks: Iterable[int], members: tuple[int, ...]) -> str:
    """``rank 1`` or ``ranks 1, 2``, with world ranks where they differ from the group's."""
    ranks = list(ranks)
    names = ", ".join(str(r) if members[r] == r else f"{r} (world {members[r]})" for r in ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"
