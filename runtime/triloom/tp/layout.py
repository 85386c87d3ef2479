"""How activations lie in memory: ``[b, s, h]``, or ``[s / tp, b, h]`` under sequence parallelism.

Batch first is what attention wants (no transposed copies). Under sequence parallelism the sequence
comes first, so that gathering and scattering it is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from ..groups.base import Group
from ..scope import Scope
from .comm import check_sequence


@dataclass(frozen=True)
class Layout:
    """The order of the first two dimensions, and this rank's part of the sequence."""

    group: Group
    sequence: bool
    """Sequence first, and split over the group between tensor-parallel regions."""

    def tokens(self, ids: Tensor) -> Tensor:
        """Token ids or targets ``[b, s]`` in the order of activations whose sequence is whole."""
        if ids.dim() != 2:
            raise ConfigError(f"token ids must be [batch, sequence], got shape {tuple(ids.shape)}")
        if not self.sequence:
            return ids
        check_sequence(ids.shape[1], self.group)
        return ids.t()

    def length(self, x: Tensor) -> int:
        """Whole sequence length of an activation between tensor-parallel regions."""
        return x.shape[0] * self.group.size if self.sequence else x.shape[1]

    def positions(self, length: int) -> slice:
        """This rank's positions between tensor-parallel regions, of a sequence of that length."""
        if not self.sequence:
            return slice(0, length)
        n = length // self.group.size
        return slice(self.group.rank * n, (self.group.rank + 1) * n)

    def over_batch(self, per_position: Tensor) -> Tensor:
        """``[s, ...]`` made to broadcast over the batch of an activation."""
        return per_position.unsqueeze(1 if self.sequence else 0)

    def by_head(self, x: Tensor) -> Tensor:
        """``[b, s, heads, d]`` (or ``[s, b, heads, d]``) as ``[b, heads, s, d]``; a view."""
        return x.permute(1, 2, 0, 3) if self.sequence else x.transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """``[b, heads, s, d]`` as an activation ``[b, s, heads * d]`` (or ``[s, b, heads * d]``)."""
        return (x.permute(2, 0, 1, 3) if self.sequence else x.transpose(1, 2)).flatten(2)

    def batch_first(self, x: Tensor) -> Tensor:
        """``[s, b, ...]`` or ``[b, s, ...]`` as ``[b, s, ...]``; a view."""
        return x.transpose(0, 1) if self.sequence else x


def layout_of(scope: Scope) -> Layout:
    """A group of one rank has no sequence to split."""
    return Layout(scope.tp, scope.sequence_parallel and scope.tp.size > 1)
