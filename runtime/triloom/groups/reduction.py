"""Sums over ranks in rank order: the one definition of a reduction that every host transport uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .base import ReduceOp

_PAIR: dict[ReduceOp, Callable[..., torch.Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}
_HALF = (torch.bfloat16, torch.float16)


def reduce_in_rank_order(out: torch.Tensor, parts: Sequence[torch.Tensor], op: ReduceOp = "sum") -> None:
    """``out = parts[0] op parts[1] op ...``, left to right, written once at the end.

    All tensors are of one dtype and length; ``out`` may be one of the parts. 16-bit floats
    accumulate in fp32 and are rounded once; other dtypes accumulate in their own.
    """
    if len(parts) == 1:
        if parts[0].data_ptr() != out.data_ptr():
            out.copy_(parts[0])
        return
    if out.dtype in _HALF:
        wide = parts[0].float()
        for part in parts[1:]:
            _PAIR[op](wide, part.float(), out=wide)
        out.copy_(wide)
        return
    aliased = any(part.data_ptr() == out.data_ptr() for part in parts[2:])
    acc = torch.empty_like(out) if aliased else out  # out holds a later summand: do not overwrite it yet
    _PAIR[op](parts[0], parts[1], out=acc)
    for part in parts[2:]:
        _PAIR[op](acc, part, out=acc)
    if aliased:
        out.copy_(acc)


def chunk_bounds(numel: int, size: int) -> list[tuple[int, int]]:
    """Element ranges of ``size`` chunks of a flat tensor: equal but for the last ones, which may be short or empty."""
    chunk = -(-numel // size)
    return [(min(r * chunk, numel), min((r + 1) * chunk, numel)) for r in range(size)]
