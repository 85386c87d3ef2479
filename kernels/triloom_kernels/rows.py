"""What kernels over rows share: how tensors become rows, the type they are computed in, and sums over rows."""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from .launching import architecture, launch, tl, triton


@triton.jit
def widen(x):
    """To the computing type: fp32, or fp64 for fp64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def _sum_rows(parts, out, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """``out[k] = sum of parts[k, :rows]`` for WIDTH columns of matrix k, ROWS rows at a time."""
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    matrix = tl.program_id(1).to(tl.int64)
    live = column < width
    sums = tl.zeros([ROWS, WIDTH], parts.dtype.element_ty)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = (matrix * rows + row[:, None]) * width + column[None, :]
        sums += tl.load(parts + at, mask=(row < rows)[:, None] & live[None, :], other=0.0)
    tl.store(out + matrix * width + column, tl.sum(sums, 0).to(out.dtype.element_ty), mask=live)


def sum_rows(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """``[k, rows, width]`` (contiguous, computing type) to ``[k, width]`` in ``dtype``, in a fixed order."""
    k, rows, width = parts.shape
    if rows == 1 and parts.dtype == dtype:
        return parts[:, 0]
    out = parts.new_empty(k, width, dtype=dtype)
    options = tuning.options("sum_rows", architecture(parts.device), width=width)
    launch(_sum_rows, (triton.cdiv(width, options["WIDTH"]), k), parts, out, rows, width, **options)
    return out


def rows_of(x: Tensor) -> Tensor:
    """``[..., h]`` as ``[rows, h]`` whose rows are contiguous; a view where the strides allow it, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def computing_type(dtype: torch.dtype) -> torch.dtype:
    """What 16-bit and fp32 tensors are computed in, and fp64 ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32
