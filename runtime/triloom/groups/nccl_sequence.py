"""What a rank has issued on a NCCL group, counted and hashed, so that ranks can compare once a step.

NCCL moves data without asking whether the ranks mean the same operation. Asking the host transport at
every call would cost what NCCL saves, so every call goes into a hash, and the hashes are compared
when the program says so (:meth:`Sequence.check`). The counts alone tell the watchdog who is late.
"""

from __future__ import annotations

import hashlib
from collections import deque
from typing import Any

import torch

from ..errors import MismatchError
from .base import Group
from .fingerprint import Call, describe, mismatch_text, pack
from .objects import agree, gather_objects

RECENT = 64
"""Calls remembered to name the first that differs."""

_NOT_LOOKED_AT = "nothing there"


class Sequence:
    """The collectives and transfers of one rank on one group. ``id``: the same on all ranks of the group."""

    def __init__(self, name: str, members: tuple[int, ...], id: int) -> None:
        self.name = name
        self.members = members
        self.id = id
        self.collectives = 0
        self.transfers = 0
        self._hash = hashlib.blake2b(digest_size=7)
        self._recent: deque[tuple[int, Call]] = deque(maxlen=RECENT)
        self._sent = [_Direction() for _ in members]
        self._received = [_Direction() for _ in members]

    def collective(self, call: Call) -> int:
        """Take a collective; returns its sequence number, from 0."""
        seq = self.collectives
        self.collectives += 1
        self._hash.update(pack(call, seq, self.id))
        self._recent.append((seq, call))
        return seq

    def transfer(self, call: Call, peer: int, *, sending: bool) -> int:
        """Take a transfer; returns its number among those with this peer in this direction."""
        self.transfers += 1
        return (self._sent if sending else self._received)[peer].take(call, self.id)

    def check(self, control: Group) -> None:
        """Collective over ``control``, the same ranks on the host, between operations.

        Raises MismatchError on every rank, naming the ranks and the first operation that differs, or
        the two ends of a pair whose sends and receives differ. What NCCL did with them is not undone.
        """
        mine = [self.collectives, _word(self._hash)]
        mine += [word for d in (*self._sent, *self._received) for word in (d.count, _word(d.hash))]
        every = torch.empty(control.size, len(mine), dtype=torch.int64)
        control.all_gather(every, torch.tensor(mine, dtype=torch.int64)).wait()
        rows: list[list[int]] = every.tolist()
        if any(row[:2] != rows[0][:2] for row in rows):
            raise MismatchError(self._difference(control))
        self._check_pairs(rows)

    def _difference(self, control: Group) -> str:
        recent = {seq: describe(call, seq) for seq, call in self._recent}
        told: list[Any] = gather_objects(control, [self.collectives, [[k, v] for k, v in recent.items()]])
        texts = [dict(map(tuple, calls)) for _, calls in told]
        counts = ", ".join(str(count) for count, _ in told)
        begin = max(min(text, default=0) for text in texts)
        for seq in range(begin, max(count for count, _ in told)):
            said = {r: text.get(seq, f"{_NOT_LOOKED_AT} (#{seq})") for r, text in enumerate(texts)}
            if len(set(said.values())) > 1:
                text = mismatch_text(self.name, said, self.members).replace("No buffer was changed. ", "")
                return f"{text}. Found by comparing sequences ({counts} collectives); buffers hold garbage by now"
        return (
            f"ranks of group {self.name!r} issued different operations more than {RECENT} collectives ago "
            f"({counts} so far); compare sequences more often (check) to learn which"
        )

    def _check_pairs(self, rows: list[list[int]]) -> None:
        n = len(self.members)
        for a in range(n):
            for b in range(n):
                sent = rows[a][2 + 2 * b : 4 + 2 * b]
                received = rows[b][2 + 2 * n + 2 * a : 4 + 2 * n + 2 * a]
                if sent != received:
                    differ = "of another dtype or length" if sent[0] == received[0] else "not as many"
                    raise MismatchError(
                        f"group {self.name!r}: rank {a} sent {sent[0]} times to rank {b}, which received "
                        f"{received[0]} times from it, {differ}; every send needs its receive, in the same order"
                    )


class _Direction:
    """The transfers to or from one peer."""

    def __init__(self) -> None:
        self.count = 0
        self.hash = hashlib.blake2b(digest_size=7)

    def take(self, call: Call, id: int) -> int:
        seq = self.count
        self.count += 1
        self.hash.update(pack(call, seq, id))
        return seq


def _word(hash: Any) -> int:
    """A 56-bit digest as an int64."""
    return int.from_bytes(hash.digest(), "little")


def agree_program(control: Group, text: str) -> None:
    """Raise MismatchError on every rank unless ``text``, the program to be run, is the same on all; by hash."""
    agree(control, "the program (hash)", hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
