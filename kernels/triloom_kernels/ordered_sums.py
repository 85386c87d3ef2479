"""Kernels of :mod:`triloom_kernels.sums`: one pass over the input, the same bits as the eager sums."""

from __future__ import annotations

import torch
from torch import Tensor

from . import sums, tuning
from .launching import architecture, launch, tl, triton
from .rows import widen
from .sums import BLOCK


@triton.jit
def _halves_added(x, ROWS: tl.constexpr, HALF: tl.constexpr):
    """``x[:, :HALF] + x[:, HALF:]``."""
    low, high = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    return low + high


@triton.jit
def _square_sums(x, out, n, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    terms = tl.load(x + at, mask=at < n, other=0.0).to(tl.float64)
    terms = terms * terms
    terms = _halves_added(terms, ROWS, 32)
    terms = _halves_added(terms, ROWS, 16)
    terms = _halves_added(terms, ROWS, 8)
    terms = _halves_added(terms, ROWS, 4)
    terms = _halves_added(terms, ROWS, 2)
    terms = _halves_added(terms, ROWS, 1)
    tl.store(out + block, tl.reshape(terms, (ROWS,)), mask=block < blocks)


@triton.jit
def _rank_sum(out, parts, ranks, n, ACCUMULATE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = at < n
    total = widen(tl.load(parts + at, mask=live, other=0.0))
    place = at
    for _ in range(1, ranks):
        place += n
        total += widen(tl.load(parts + place, mask=live, other=0.0))
    if ACCUMULATE:
        total = widen(tl.load(out + at, mask=live, other=0.0)) + total
    tl.store(out + at, total.to(out.dtype.element_ty), mask=live)


def square_sums(x: Tensor) -> Tensor:
    """As :func:`triloom_kernels.sums.square_sums`, the same bits. Half the traffic of a square and a sum."""
    n = x.numel()
    blocks = -(-n // BLOCK)
    out = torch.empty(blocks, dtype=torch.float64, device=x.device)
    options = tuning.options("square_sums", architecture(x.device))
    grid = (triton.cdiv(blocks, options["ROWS"]),)
    launch(_square_sums, grid, x, out, n, blocks, BLOCK=BLOCK, enable_fp_fusion=False, **options)
    return out


def rank_sum_(out: Tensor, parts: Tensor, *, accumulate: bool = False) -> Tensor:
    """As :func:`triloom_kernels.sums.rank_sum_`, the same bits; out contiguous."""
    if out.dtype == torch.float64 or parts.dtype == torch.float64:
        return sums.rank_sum_(out, parts, accumulate=accumulate)
    ranks, n = parts.shape
    options = tuning.options("rank_sum", architecture(out.device))
    launch(_rank_sum, (triton.cdiv(n, options["SIZE"]),), out, parts, ranks, n, ACCUMULATE=accumulate, **options)
    return out
