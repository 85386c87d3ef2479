"""Kernels of :mod:`triloom_kernels.dropout`: one pass each way over x, the residual and the result.

Four neighbours share one evaluation of Philox where rows start at a multiple of four; elsewhere each element has its
own, at four times the arithmetic. In fp32 the result has the bits of the eager one; in 16 bits it is rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .dropout import check
from .launching import architecture, launch, tl, triton
from .rows import computing_type, rows_of, sum_rows, widen


@triton.jit
def _words(counter, key_low, key_high):
    """The four words at a 64-bit counter."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    k0 = zero + key_low.to(tl.uint32, bitcast=True)
    k1 = zero + key_high.to(tl.uint32, bitcast=True)
    return tl.philox_impl(low, high, zero, zero, k0, k1)


@triton.jit(do_not_specialize=["key_low", "key_high", "base_low", "base_high"])
def _drop(
    x, bias, residual, y, parts, rows, width, x_stride, residual_stride, inner, outer_step, inner_step, step,
    key_low, key_high, base_low, base_high,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, QUADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row blocks in turns. Row r starts at index ``base + r // inner * outer_step + r % inner * inner_step``."""
    chunks = tl.cdiv(width, WIDTH)
    program, first = tl.program_id(0) // chunks, tl.program_id(0) % chunks * WIDTH
    column = first + tl.arange(0, WIDTH)[None, :]
    base = (base_high.to(tl.int64) << 32) | (base_low.to(tl.int64) & 0xFFFFFFFF)
    b = 0.0 if bias is None else widen(tl.load(bias + column, mask=column < width, other=0.0))
    sums = tl.zeros([ROWS, WIDTH], tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0) // chunks):
        number = block * ROWS + tl.arange(0, ROWS)[:, None]
        row, inside = number.to(tl.int64), (number < rows) & (column < width)
        start = base + (number // inner).to(tl.int64) * outer_step + (number % inner).to(tl.int64) * inner_step
        if QUADS:
            quad = ((start + first) >> 2) + tl.arange(0, WIDTH // 4)[None, :]
            w0, w1, w2, w3 = _words(quad, key_low, key_high)
            word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        else:
            index = start + column.to(tl.int64) * step
            w0, w1, w2, w3 = _words(index >> 2, key_low, key_high)
            odd, high = (index & 1) != 0, (index & 2) != 0
            word = tl.where(high, tl.where(odd, w3, w2), tl.where(odd, w1, w0))
        v = (widen(tl.load(x + row * x_stride + column, mask=inside, other=0.0)) + b) * SCALE
        v = tl.where(word < THRESHOLD, 0.0, v)
        if parts is not None:
            sums += tl.where(inside, v, 0.0)
        if residual is not None:
            v += widen(tl.load(residual + row * residual_stride + column, mask=inside, other=0.0))
        tl.store(y + row * width + column, v.to(y.dtype.element_ty), mask=inside)
    if parts is not None:
        columns = first + tl.arange(0, WIDTH)
        tl.store(parts + program.to(tl.int64) * width + columns, tl.sum(sums, 0), mask=columns < width)


def fold(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int, int]:
    """``(inner, outer_step, inner_step)``: leading dimensions as two whose rows are numbered through.

    Raises ValueError where it takes more than two; no cut of an activation over a mesh does.
    """
    dims: list[tuple[int, int]] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * step:
            size *= dims.pop()[0]
        dims.append((size, step))
    if len(dims) > 2:
        raise ValueError(
            f"the dropout kernel numbers rows over two dimensions, but leading dimensions {tuple(shape)} with index "
            f"strides {tuple(strides)} are {len(dims)}; use the eager operation (triloom_kernels.table.eager())"
        )
    outer, inner = [(1, 0), (1, 0), *dims][-2:]
    return inner[0], outer[1], inner[1]


def _signed(word: int) -> int:
    """A 32-bit word as the signed integer of the same bits, so that the argument's type never changes."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _halves(number: int) -> tuple[int, int]:
    return _signed(number & 0xFFFFFFFF), _signed(number >> 32)


def _run(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, how: tuple[Any, ...], *, bias_grad: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The kernel's result, and the sums over rows of what was dropped if ``bias_grad``."""
    p, key, base, strides = how
    inner, outer_step, inner_step = fold(x.shape[:-1], strides[:-1])
    v, r = rows_of(x), None if residual is None else rows_of(residual)
    bias = None if bias is None else bias.contiguous()
    rows, width = v.shape
    dtype = x.dtype if residual is None else torch.result_type(x, residual)
    y = torch.empty(v.shape, dtype=dtype, device=x.device)
    options = tuning.options("dropout", architecture(x.device), width=width)
    most = options.pop("PROGRAMS")
    programs, parts = triton.cdiv(rows, options["ROWS"]), None
    if bias_grad:
        programs = min(most, programs)
        parts = torch.empty(1, programs, width, dtype=computing_type(dtype), device=x.device)
    launch(
        _drop, (programs * triton.cdiv(width, options["WIDTH"]),), v, bias, r, y, parts, rows, width, v.stride(0),
        0 if r is None else r.stride(0), inner, outer_step, inner_step, strides[-1], *_halves(key), *_halves(base),
        THRESHOLD=int(p * 2**32), SCALE=1.0 / (1.0 - p), enable_fp_fusion=False,
        QUADS=strides[-1] == 1 and all(n % 4 == 0 for n in (base, outer_step, inner_step)), **options,
    )  # fmt: skip
    return y.view(x.shape), parts


class CountedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, *how: Any) -> Tensor:
        ctx.how, ctx.bias_dtype = how, None if bias is None else bias.dtype
        return _run(x, bias, residual, how)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dx, parts = _run(grad, None, None, ctx.how, bias_grad=ctx.needs_input_grad[1])
        dbias = None if parts is None else sum_rows(parts, ctx.bias_dtype)[0]
        return dx, dbias, grad if ctx.needs_input_grad[2] else None, *(None for _ in ctx.how)


def dropout(x: Tensor, p: float, key: int, base: int, strides: Sequence[int]) -> Tensor:
    """As the eager one, differentiable once. Copies x where its leading dimensions do not fold.

    Raises ValueError for leading dimensions whose index strides do not fold into two.
    """
    check(x, p, key, base, strides)
    if p == 0.0:
        return x
    out: Tensor = CountedDropout.apply(x, None, None, p, key, base, tuple(strides))  # type: ignore[no-untyped-call]
    return out


def bias_dropout_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, key: int, base: int, strides: Sequence[int]
) -> Tensor:
    """As the eager one in one launch, differentiable once. Copies x where its leading dimensions do not fold.

    Raises ValueError for leading dimensions whose index strides do not fold into two, and for a residual of another
    shape.
    """
    check(x, p, key, base, strides)
    if residual.shape != x.shape:
        raise ValueError(f"the residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}: they must be equal")
    out: Tensor = CountedDropout.apply(x, bias, residual, p, key, base, tuple(strides))  # type: ignore[no-untyped-call]
    return out
