"""The group of one rank: every operation is a copy, done when it is issued."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import MismatchError
from .base import Done, Group, Work
from .checked import CheckedGroup
from .fingerprint import Call


class Solo(CheckedGroup):
    """A group of size 1. ``world_rank`` is the rank it stands for."""

    def __init__(self, world_rank: int = 0, name: str = "solo") -> None:
        self.name = name
        self.rank = 0
        self.size = 1
        self.members = (world_rank,)

    def _issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        if call.refused:
            raise MismatchError(f"{call.op} on group {self.name!r}: {call.refused}")
        if output is not None and input is not None and output.data_ptr() != input.data_ptr():
            output.data.view(-1).copy_(input.data.view(-1))
        return Done()

    def _transfer(self, call: Call, tensor: torch.Tensor, peer: int, *, sending: bool) -> Work:
        raise AssertionError("a group of one rank has no peers; CheckedGroup refuses every peer")

    def _subgroup(self, parts: Sequence[Sequence[int]], name: str) -> Group:
        return Solo(self.members[0], name)

    def close(self) -> None:
        return None
