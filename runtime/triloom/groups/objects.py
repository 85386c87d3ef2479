"""Small JSON values over a group: gathered, broadcast, or checked to be equal. JSON only, no pickle."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import MismatchError
from .base import Group
from .fingerprint import rank_list

HEAD_WORDS = 64
"""int64 words of the first message of an object: its length in bytes, then its beginning. Most objects need no second:
one exchange instead of two, which is what connecting many ranks is made of."""
HEAD_BYTES = 8 * (HEAD_WORDS - 1)


def gather_objects(group: Group, value: Any) -> list[Any]:
    """The ``value`` of every rank, in rank order, on every rank. Values are JSON (tuples arrive as lists)."""
    data = json.dumps(value).encode()
    heads = torch.empty(group.size * HEAD_WORDS, dtype=torch.int64)
    group.all_gather(heads, _head(data)).wait()
    rows = heads.view(group.size, HEAD_WORDS)
    lengths = rows[:, 0].tolist()
    words = _words(max(lengths) - HEAD_BYTES)
    rest = torch.empty(group.size * words, dtype=torch.int64)
    if words:
        group.all_gather(rest, _to_words(data[HEAD_BYTES:], words)).wait()
    parts = zip(rows, rest.view(group.size, words), lengths, strict=True)
    return [json.loads((_to_bytes(row[1:]) + _to_bytes(more))[:n]) for row, more, n in parts]


def broadcast_object(group: Group, value: Any, root: int = 0) -> Any:
    """The root's JSON ``value`` on every rank; what other ranks pass is not looked at."""
    data = json.dumps(value).encode() if group.rank == root else b""
    head = _head(data)
    group.broadcast(head, root).wait()
    length = int(head[0])
    rest = _to_words(data[HEAD_BYTES:], _words(length - HEAD_BYTES))
    if rest.numel():
        group.broadcast(rest, root).wait()
    return json.loads((_to_bytes(head[1:]) + _to_bytes(rest))[:length])


def agree(group: Group, what: str, value: Any) -> None:
    """Raise MismatchError on every rank, naming ranks and values, unless ``value`` is the same on all."""
    values = gather_objects(group, value)
    by_value: dict[str, list[int]] = {}
    for rank, v in enumerate(values):
        by_value.setdefault(json.dumps(v), []).append(rank)
    if len(by_value) > 1:
        sides = "; ".join(f"{rank_list(ranks, group.members)}: {v}" for v, ranks in by_value.items())
        raise MismatchError(f"ranks of group {group.name!r} disagree on {what}: {sides}")


def _head(data: bytes) -> torch.Tensor:
    return torch.cat([torch.tensor([len(data)]), _to_words(data[:HEAD_BYTES], HEAD_WORDS - 1)])


def _words(nbytes: int) -> int:
    return max(0, -(-nbytes // 8))


def _to_words(data: bytes, words: int) -> torch.Tensor:
    padded = bytearray(data.ljust(words * 8, b"\0"))
    return torch.frombuffer(padded, dtype=torch.int64) if words else torch.empty(0, dtype=torch.int64)


def _to_bytes(words: torch.Tensor) -> bytes:
    return words.contiguous().numpy().tobytes()
