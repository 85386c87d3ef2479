"""Sums over ranks in rank order: the one definition of a reduction that every host transport uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .base import ReduceOp

_ACCUMULATE: dict[ReduceOp, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.Tensor.add_,
    "max": lambda acc, x: torch.maximum(acc, x, out=acc),
    "min": lambda acc, x: torch.minimum(acc, x, out=acc),
}
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
    accumulate = _ACCUMULATE[op]
    if out.dtype in _HALF:
        wide = parts[0].float()
        for part in parts[1:]:
            accumulate(wide, part.float())
        out.copy_(wide)
        return
    if any(part.data_ptr() == out.data_ptr() for part in parts[1:]):
        acc = accumulate(parts[0].clone(), parts[1])  # out holds a later summand: do not overwrite it yet
    else:
        if parts[0].data_ptr() != out.data_ptr():
            out.copy_(parts[0])
        acc = accumulate(out, parts[1])
    for part in parts[2:]:
        accumulate(acc, part)
    if acc.data_ptr() != out.data_ptr():
        out.copy_(acc)


def chunk_bounds(numel: int, size: int) -> list[tuple[int, int]]:
    """Element ranges of ``size`` chunks of a flat tensor: equal but for the last ones, which may be short or empty."""
    chunk = -(-numel // size)
    return [(min(r * chunk, numel), min((r + 1) * chunk, numel)) for r in range(size)]
