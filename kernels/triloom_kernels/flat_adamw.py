"""Kernels of :mod:`triloom_kernels.adamw`: 28 bytes an fp32 element, each read and written once.

Bound by memory. No multiplication is fused with an addition, and divisions and roots are correctly rounded: the bits
are those of the eager update. fp64 parameters take the eager one, as no training keeps masters in fp64 on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import adamw, tuning
from .adamw import BLOCK, Numbers
from .launching import architecture, launch, tl, triton


@triton.jit
def _updated(p, m, r, decay, rate, inv_sqrt_correction, eps):
    """The new parameter, r being the root of the second average."""
    return p * decay - tl.div_rn(rate * m, r * inv_sqrt_correction + eps)


@triton.jit
def _adamw(
    param, grad, exp_avg, exp_avg_sq, low, n,
    grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps,
    SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    live = at < n
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(exp_avg + at, mask=live, other=0.0) * beta1 + g * one_minus_beta1
    v = tl.load(exp_avg_sq + at, mask=live, other=0.0) * beta2 + (g * one_minus_beta2) * g
    p = tl.load(param + at, mask=live, other=0.0)
    p = _updated(p, m, tl.sqrt_rn(v), decay, rate, inv_sqrt_correction, eps)
    tl.store(param + at, p, mask=live)
    tl.store(exp_avg + at, m, mask=live)
    tl.store(exp_avg_sq + at, v, mask=live)
    if low is not None:
        tl.store(low + at, p.to(low.dtype.element_ty), mask=live)


@triton.jit
def _decoded(codes, largest, numbers, at, block, live, blocks):
    top = tl.load(largest + block, mask=block < blocks, other=0.0)
    code = tl.load(codes + at, mask=live, other=0).to(tl.int32)
    return tl.load(numbers + code) * top[:, None]


@triton.jit
def _encode(values, codes, largest, bounds, at, block, live, blocks):
    """By halving: the code is the number of bounds below the value, of 255."""
    top = tl.max(tl.abs(values), 1)
    x = tl.div_rn(values, tl.where(top == 0.0, 1.0, top)[:, None])
    code = tl.zeros(x.shape, tl.int32)
    for k in tl.static_range(8):
        code += tl.where(tl.load(bounds + code + ((128 >> k) - 1)) < x, 128 >> k, 0)
    tl.store(codes + at, code.to(tl.uint8), mask=live)
    tl.store(largest + block, top, mask=block < blocks)


@triton.jit
def _adamw8(
    param, grad, exp_avg, exp_avg_max, root, root_max, tables, low, blocks,
    grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (block < blocks)[:, None] & (at >= 0)
    g = tl.load(grad + at, mask=live, other=0.0).to(tl.float32) * grad_scale
    m = _decoded(exp_avg, exp_avg_max, tables, at, block, live, blocks)
    r = _decoded(root, root_max, tables + 512, at, block, live, blocks)
    m = m * beta1 + g * one_minus_beta1
    r = tl.sqrt_rn((r * r) * beta2 + (g * one_minus_beta2) * g)
    p = tl.load(param + at, mask=live, other=0.0)
    p = _updated(p, m, r, decay, rate, inv_sqrt_correction, eps)
    tl.store(param + at, p, mask=live)
    if low is not None:
        tl.store(low + at, p.to(low.dtype.element_ty), mask=live)
    _encode(m, exp_avg, exp_avg_max, tables + 256, at, block, live, blocks)
    _encode(r, root, root_max, tables + 768, at, block, live, blocks)


def adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Numbers, low: Tensor | None = None
) -> None:
    """As :func:`triloom_kernels.adamw.adamw_`, the same bits; tensors contiguous."""
    if param.dtype == torch.float64:
        adamw.adamw_(param, grad, exp_avg, exp_avg_sq, numbers, low)
        return
    n = param.numel()
    options = tuning.options("adamw", architecture(param.device))
    grid = (triton.cdiv(n, options["SIZE"]),)
    launch(_adamw, grid, param, grad, exp_avg, exp_avg_sq, low, n, *numbers, enable_fp_fusion=False, **options)


def adamw8_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_max: Tensor,
    root: Tensor,
    root_max: Tensor,
    numbers: Numbers,
    tables: Tensor,
    low: Tensor | None = None,
) -> None:
    """As :func:`triloom_kernels.adamw.adamw8_`, the same bits; tensors contiguous."""
    states = (exp_avg, exp_avg_max, root, root_max)
    if param.dtype == torch.float64:
        adamw.adamw8_(param, grad, *states, numbers, tables, low)
        return
    blocks = param.numel() // BLOCK
    options = tuning.options("adamw8", architecture(param.device))
    grid = (triton.cdiv(blocks, options["ROWS"]),)
    launch(
        _adamw8, grid, param, grad, *states, tables, low, blocks, *numbers,
        BLOCK=BLOCK, enable_fp_fusion=False, **options,
    )  # fmt: skip
