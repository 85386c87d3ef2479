"""Reductions over ranks in rank order, by address, and how a flat tensor is cut into chunks.

The one definition of a reduction for every host transport is :func:`triloom.native.reduce_ranks`;
here is its form without checks for the hot path, where the operands are a group's own buffers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _C
from ..native import DTYPE_CODES, REDUCE_CODES


def reduce_addresses(out: int, parts: Sequence[int], dtype: torch.dtype, numel: int, op: str) -> None:
    """``out = ((parts[0] op parts[1]) op parts[2]) ...`` over host memory of ``numel`` elements each.

    ``out`` may be one of the parts. 16-bit floats accumulate in fp32 and are rounded once.
    """
    if numel:
        _C.reduce_ranks(out, parts, DTYPE_CODES[dtype], numel, REDUCE_CODES[op], None)


def chunk_bounds(numel: int, size: int) -> list[tuple[int, int]]:
    """Element ranges of ``size`` chunks of a flat tensor: equal but for the last ones, which may be short or empty."""
    chunk = -(-numel // size)
    return [(min(r * chunk, numel), min((r + 1) * chunk, numel)) for r in range(size)]
