"""Boundary tensors between stages: posted, held until sent, received early, taken when needed.

A transfer of a pytree is one message per tensor. Shapes are known from the step before with the
same batch shapes; in a step whose batch shapes are new, every activation travels behind a header
(both sides know it: the batch shapes are the same on all stages), and its receive is posted when it
is taken, because the header must be read first. So is every activation where shapes depend on the data.

A receive that is posted when it is taken, in the order of its link, cannot deadlock where one posted
early does not, on independent operations or a lane per direction: nobody waits for it but its taker and
the takers of what follows on the link.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..groups.base import DTYPES, Group, Work
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
    """``int64[HEADER_WORDS]``. Raises ConfigError for a pytree that cannot be described in it."""
    try:
        text = json.dumps([pytree.treespec_dumps(meta.spec), meta.leaves, meta.needs_grad]).encode()
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"what goes from stage to stage must be dicts, lists, tuples, tensors and plain values (None, bool, int, "
            f"float, str): {str(error).splitlines()[0]}"
        ) from error
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


def _words(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """int64 words that hold such a tensor."""
    return -(-torch.Size(shape).numel() * dtype.itemsize // 8)


def pack(t: torch.Tensor) -> torch.Tensor:
    """The tensor as groups take it: contiguous, and of a dtype that they have, or its bytes in int64 words (a copy)."""
    t = t.contiguous()
    if t.dtype in DTYPES:
        return t
    words = torch.zeros(_words(tuple(t.shape), t.dtype), dtype=torch.int64, device=t.device)
    words.view(torch.uint8)[: t.nbytes] = t.view(-1).view(torch.uint8)
    return words


def room_for(meta: TensorMeta, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor to be received, and what groups put it into: itself, or int64 words that it is a view of."""
    shape, dtype = meta
    if dtype in DTYPES:
        t = torch.empty(shape, dtype=dtype, device=device)
        return t, t
    words = torch.empty(_words(shape, dtype), dtype=torch.int64, device=device)
    flat = words.view(torch.uint8)[: torch.Size(shape).numel() * dtype.itemsize]
    return flat.view(dtype).view(shape), words


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
        for t in map(pack, tensors):
            self._outbox.append((group.send(t, rank), t, alone))
            alone = 0

    @property
    def held(self) -> int:
        """Bytes under way that nobody else holds."""
        return sum(alone for _, _, alone in self._outbox)

    def expected(self) -> Iterator[Any]:
        """Keys of what is on its way here, or has come and was not taken."""
        for box in self._inboxes.values():
            yield from box.posted
            yield from (key for key, _ in box.waiting)

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
        rooms = [room_for(meta, self._device) for meta in metas]
        return [t for t, _ in rooms], [group.recv(words, rank) for _, words in rooms]

    def drain(self) -> None:
        """Wait until everything has left."""
        for work, _, _ in self._outbox:
            work.wait()
        self._outbox.clear()
