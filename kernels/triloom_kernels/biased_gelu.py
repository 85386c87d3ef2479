"""Kernels of :mod:`triloom_kernels.gelu`: one pass each way; the gradient of the bias is summed in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .curves import curve, curve_and_slope
from .gated import GELU
from .launching import architecture, launch, tl, triton
from .rows import computing_type, rows_of, sum_rows, widen


@triton.jit
def _gelu_forward(
    x, bias, y, rows, width, stride, KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    chunks = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    v = widen(tl.load(x + row * stride + column, mask=inside, other=0.0))
    if bias is not None:
        v += widen(tl.load(bias + column, mask=column < width, other=0.0))
    tl.store(y + row * width + column, curve(v, KIND).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward(
    grad, x, bias, dx, parts, rows, width, grad_stride, stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row blocks in turns; without ``parts`` there is a program for each."""
    chunks = tl.cdiv(width, WIDTH)
    program, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * WIDTH
    column = first + tl.arange(0, WIDTH)[None, :]
    b = 0.0 if bias is None else widen(tl.load(bias + column, mask=column < width, other=0.0))
    sums = tl.zeros([ROWS, WIDTH], tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0) // chunks):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (row < rows) & (column < width)
        g = widen(tl.load(grad + row * grad_stride + column, mask=inside, other=0.0))
        v = widen(tl.load(x + row * stride + column, mask=inside, other=0.0)) + b
        g *= curve_and_slope(v, KIND)[1]
        tl.store(dx + row * width + column, g.to(dx.dtype.element_ty), mask=inside)
        sums += g
    if parts is not None:
        columns = first + tl.arange(0, WIDTH)
        tl.store(parts + program.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


class BiasGELU(torch.autograd.Function):
    """kind: a curve of :mod:`triloom_kernels.curves`. Keeps x and the bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        v, bias = rows_of(x), None if bias is None else bias.contiguous()
        rows, width = v.shape
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        options = tuning.options("gelu", architecture(x.device), width=width)
        del options["PROGRAMS"]
        grid = (triton.cdiv(rows, options["ROWS"]) * triton.cdiv(width, options["WIDTH"]),)
        launch(_gelu_forward, grid, v, bias, y, rows, width, v.stride(0), KIND=kind, **options)
        ctx.save_for_backward(v, bias)
        ctx.kind, ctx.shape = kind, x.shape
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, bias = ctx.saved_tensors
        g = rows_of(grad)
        rows, width = g.shape
        options = tuning.options("gelu", architecture(x.device), width=width)
        most = options.pop("PROGRAMS")
        programs, parts = triton.cdiv(rows, options["ROWS"]), None
        if ctx.needs_input_grad[1]:
            programs = min(most, programs)
            parts = x.new_empty(1, programs, width, dtype=computing_type(x.dtype))
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        grid = (programs * triton.cdiv(width, options["WIDTH"]),)
        strides = g.stride(0), x.stride(0)
        launch(_gelu_backward, grid, g, x, bias, dx, parts, rows, width, *strides, KIND=ctx.kind, **options)
        return dx.view(ctx.shape), None if parts is None else sum_rows(parts, bias.dtype)[0], None


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """As the eager one. Copies x where its leading dimensions do not fold."""
    out: Tensor = BiasGELU.apply(x, None, GELU[approximate])  # type: ignore[no-untyped-call]
    return out


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """As the eager one, without rounding the sum. Copies x where its leading dimensions do not fold."""
    out: Tensor = BiasGELU.apply(x, bias, GELU[approximate])  # type: ignore[no-untyped-call]
    return out
