"""Kernels of the gated activations on a fused projection: :mod:`triloom_kernels.swiglu`, :mod:`triloom_kernels.geglu`.

    y = a(gate) * up        dgate = g * up * a'(gate)        dup = g * a(gate)

One pass each way over ``[rows, 2 f]``, gate first; nothing but the input is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .curves import curve, curve_and_slope
from .launching import architecture, launch, tl, triton
from .rows import rows_of, widen


@triton.jit
def _gated_forward(
    gate_up, y, rows, width, stride, KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    chunks = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    gate = widen(tl.load(gate_up + row * stride + column, mask=inside, other=0.0))
    up = widen(tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0))
    tl.store(y + row * width + column, (curve(gate, KIND) * up).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    grad, gate_up, out, rows, width, grad_stride, stride, KIND: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    chunks = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // chunks * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.program_id(0) % chunks * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = (row < rows) & (column < width)
    g = widen(tl.load(grad + row * grad_stride + column, mask=inside, other=0.0))
    gate = widen(tl.load(gate_up + row * stride + column, mask=inside, other=0.0))
    up = widen(tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0))
    value, slope = curve_and_slope(gate, KIND)
    at = out + row * (2 * width) + column
    tl.store(at, (g * up * slope).to(out.dtype.element_ty), mask=inside)
    tl.store(at + width, (g * value).to(out.dtype.element_ty), mask=inside)


class Gated(torch.autograd.Function):
    """kind: a curve of :mod:`triloom_kernels.curves`."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, kind: str) -> Tensor:
        if gate_up.shape[-1] % 2:
            raise ValueError(f"gate and up need an even last dimension, got shape {tuple(gate_up.shape)}")
        x = rows_of(gate_up)
        rows, width = x.shape[0], x.shape[1] // 2
        y = x.new_empty(rows, width)
        options = tuning.options("gated", architecture(x.device), width=width)
        grid = (triton.cdiv(rows, options["ROWS"]) * triton.cdiv(width, options["WIDTH"]),)
        launch(_gated_forward, grid, x, y, rows, width, x.stride(0), KIND=kind, **options)
        ctx.save_for_backward(x)
        ctx.kind, ctx.shape = kind, gate_up.shape
        return y.view(*gate_up.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        g = rows_of(grad)
        rows, width = g.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        options = tuning.options("gated", architecture(x.device), width=width)
        grid = (triton.cdiv(rows, options["ROWS"]) * triton.cdiv(width, options["WIDTH"]),)
        launch(_gated_backward, grid, g, x, out, rows, width, g.stride(0), x.stride(0), KIND=ctx.kind, **options)
        return out.view(ctx.shape), None


def swiglu(gate_up: Tensor) -> Tensor:
    """As the eager one, rounded once. Copies the input where its leading dimensions do not fold."""
    out: Tensor = Gated.apply(gate_up, "silu")  # type: ignore[no-untyped-call]
    return out


def geglu(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """As the eager one, rounded once. Copies the input where its leading dimensions do not fold."""
    out: Tensor = Gated.apply(gate_up, GELU[approximate])  # type: ignore[no-untyped-call]
    return out


GELU = {"tanh": "gelu_tanh", "none": "gelu_erf"}
"""Names of torch's forms of GELU -> curves."""
