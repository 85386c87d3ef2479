"""Small JSON values over a group: gathered, broadcast, or checked to be equal. JSON only, no pickle."""

from __future__ import annotations

import json
from typing import Any

import torch

from ..errors import MismatchError
from .base import Group
from .fingerprint import rank_list


def gather_objects(group: Group, value: Any) -> list[Any]:
    """The ``value`` of every rank, in rank order, on every rank. Values are JSON (tuples arrive as lists)."""
    data = json.dumps(value).encode()
    lengths = torch.empty(group.size, dtype=torch.int64)
    group.all_gather(lengths, torch.tensor([len(data)], dtype=torch.int64)).wait()
    words = (int(lengths.max()) + 7) // 8
    gathered = torch.empty(group.size * words, dtype=torch.int64)
    group.all_gather(gathered, _to_words(data, words)).wait()
    return [
        json.loads(_to_bytes(chunk, int(n))) for chunk, n in zip(gathered.view(group.size, words), lengths, strict=True)
    ]


def broadcast_object(group: Group, value: Any, root: int = 0) -> Any:
    """The root's JSON ``value`` on every rank; what other ranks pass is not looked at."""
    data = json.dumps(value).encode() if group.rank == root else b""
    length = torch.tensor([len(data)], dtype=torch.int64)
    group.broadcast(length, root).wait()
    words = _to_words(data, (int(length) + 7) // 8)
    group.broadcast(words, root).wait()
    return json.loads(_to_bytes(words, int(length)))


def agree(group: Group, what: str, value: Any) -> None:
    """Raise MismatchError on every rank, naming ranks and values, unless ``value`` is the same on all."""
    values = gather_objects(group, value)
    by_value: dict[str, list[int]] = {}
    for rank, v in enumerate(values):
        by_value.setdefault(json.dumps(v), []).append(rank)
    if len(by_value) > 1:
        sides = "; ".join(f"{rank_list(ranks, group.members)}: {v}" for v, ranks in by_value.items())
        raise MismatchError(f"ranks of group {group.name!r} disagree on {what}: {sides}")


def _to_words(data: bytes, words: int) -> torch.Tensor:
    padded = bytearray(data) + bytearray(words * 8 - len(data))
    return torch.frombuffer(padded, dtype=torch.int64).clone() if words else torch.empty(0, dtype=torch.int64)


def _to_bytes(words: torch.Tensor, length: int) -> bytes:
    return words.contiguous().numpy().tobytes()[:length]
