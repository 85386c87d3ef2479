"""Boundary tensors between stages: posted, held until sent, received early, taken when needed.

A transfer of a pytree is one message per tensor. Shapes are known from the step before with the
same batch shapes; in a step whose batch shapes are new, every activation travels behind a header
(both sides know it: the batch shapes are the same on all stages), and its receive is posted when it
is taken, because the header must be read first.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..groups.base import Group, Work
from .cut import Boundary

HEADER_WORDS = 512
"""int64 words of a shape header (4 KiB of JSON): fixed, so that the receiver can post it blindly."""

Link = Callable[[int, str], tuple[Group, int]]
"""``link(coordinate)``: the group and the peer's rank in it that reach a pipeline coordinate."""

Waited = Callable[[int, int], None]
"""``waited(begin_ns, end_ns)``: is told of every wait for a receive."""

TensorMeta = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class TreeMeta:
    """Shape of a boundary: the structure, each leaf's (shape, dtype) or its plain value."""

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    needs_grad: tuple[bool, ...]

    def tensors(self) -> list[TensorMeta]:
        return [(tuple(x["shape"]), getattr(torch, x["dtype"])) for x in self.leaves if isinstance(x, dict)]


def meta_of(b: Boundary) -> TreeMeta:
    leaves = tuple(
        {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} if isinstance(x, torch.Tensor) else x
        for x in b.leaves
    )
    return TreeMeta(b.spec, leaves, b.needs_grad)


def fill(meta: TreeMeta, tensors: list[torch.Tensor]) -> Boundary:
    it = iter(tensors)
    leaves = [next(it) if isinstance(x, dict) else x for x in meta.leaves]
    return Boundary(leaves, meta.spec, meta.needs_grad)


def encode(meta: TreeMeta) -> torch.Tensor:
    text = json.dumps([pytree.treespec_dumps(meta.spec), meta.leaves, meta.needs_grad]).encode()
    if len(text) > 8 * (HEADER_WORDS - 1):
        raise ConfigError(
            f"the pytree between two stages describes itself in {len(text)} bytes, at most {8 * (HEADER_WORDS - 1)} "
            "are possible: pass fewer leaves between units, or put the two units into one stage"
        )
    raw = torch.zeros(8 * HEADER_WORDS, dtype=torch.uint8)
    raw[8 : 8 + len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    words = raw.view(torch.int64)
    words[0] = len(text)
    return words


def decode(words: torch.Tensor) -> TreeMeta:
    raw = words.view(torch.uint8)[8 : 8 + int(words[0])]
    spec, leaves, needs = json.loads(bytes(raw.tolist()))
    return TreeMeta(pytree.treespec_loads(spec), tuple(leaves), tuple(needs))


@dataclass(slots=True)
class _Inbox:
    """Receives of one (peer), in program order."""

    posted: dict[Any, tuple[list[torch.Tensor], list[Work]]] = field(default_factory=dict)
    waiting: deque[tuple[Any, Callable[[], list[TensorMeta]]]] = field(default_factory=deque)


class Wire:
    """All transfers of one rank with its pipeline neighbours."""

    def __init__(self, link: Link, device: torch.device, waited: Waited | None = None) -> None:
        self._link = link
        self._waited = waited
        self._device = device
        self._outbox: list[tuple[Work, torch.Tensor, int]] = []
        self._inboxes: dict[int, _Inbox] = {}

    def send(self, tensors: list[torch.Tensor], peer: int, alone: int = 0) -> None:
        """Post; the tensors are held until they have left. alone: bytes that nobody else holds."""
        group, rank = self._link(peer, "send")
        self._outbox = [entry for entry in self._outbox if not entry[0].done()]
        for t in tensors:
            t = t.contiguous()
            self._outbox.append((group.send(t, rank), t, alone))
            alone = 0

    @property
    def held(self) -> int:
        """Bytes under way that nobody else holds."""
        return sum(alone for _, _, alone in self._outbox)

    def expect(self, key: Any, peer: int, known: list[TensorMeta] | None, late: Callable[[], list[TensorMeta]]) -> None:
        """Post the receive of ``key`` if its shapes are known; else ``late()`` gives them when it is taken."""
        box = self._inboxes.setdefault((peer), _Inbox())
        if known is None or box.waiting:
            box.waiting.append((key, late if known is None else lambda: known))
        else:
            box.posted[key] = self._post(known, peer)

    def take(self, key: Any, peer: int) -> list[torch.Tensor]:
        """Wait for the tensors of ``key``."""
        if self._waited is None:
            return self._take(key, peer)
        begin = time.perf_counter_ns()
        tensors = self._take(key, peer)
        self._waited(begin, time.perf_counter_ns())
        return tensors

    def _take(self, key: Any, peer: int) -> list[torch.Tensor]:
        box = self._inboxes[peer]
        while key not in box.posted:
            earlier, metas = box.waiting.popleft()
            box.posted[earlier] = self._post(metas(), peer)
        tensors, works = box.posted.pop(key)
        for w in works:
            w.wait()
        return tensors

    def receive_header(self, peer: int) -> TreeMeta:
        group, rank = self._link(peer, "recv")
        words = torch.empty(HEADER_WORDS, dtype=torch.int64)
        group.recv(words, rank).wait()
        return decode(words)

    def _post(self, metas: list[TensorMeta], peer: int) -> tuple[list[torch.Tensor], list[Work]]:
        group, rank = self._link(peer, "recv")
        tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in metas]
        return tensors, [group.recv(t, rank) for t in tensors]

    def drain(self) -> None:
        """Wait until everything has left."""
        for work, _, _ in self._outbox:
            work.wait()
        self._outbox.clear()
