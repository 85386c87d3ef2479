"""Kernels of :mod:`triloom_kernels.rms_norm` and :mod:`triloom_kernels.layer_norm`, alone or after a residual addition.

With xhat = (x - mean) * rstd (mean = 0 for RMSNorm) over rows of width h, wg = w * g and bars for means over a row:

    dx = rstd * (wg - xhat * bar(xhat * wg) - bar(wg))        (the last term for LayerNorm only)
    dw = sum_rows g * xhat        db = sum_rows g

A row of up to 8,192 (backward) or 16,384 (forward) elements stays in registers and is read once; wider rows are read
again, by chunks, out of the cache. Programs of the backward take rows in turns and leave one row of dw and db
each; a second kernel adds these in a fixed order: no atomics, the same bits every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .launching import architecture, launch, tl, triton
from .rows import computing_type, rows_of, sum_rows, widen


@triton.jit
def _sum(x, residual, total, x_at, residual_at, inside):
    """x, or x + residual rounded as it is stored, in the computing type."""
    v = widen(tl.load(x + x_at, mask=inside, other=0.0))
    if residual is not None:
        v = widen((v + widen(tl.load(residual + residual_at, mask=inside, other=0.0))).to(total.dtype.element_ty))
    return v


@triton.jit
def _norm_forward(
    x, residual, weight, bias, total, y, rstd_out, mean_out, rows, width, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    live, at = row < rows, row[:, None]
    inside = live[:, None] & (column < width)
    v = _sum(x, residual, total, at * x_stride + column, at * residual_stride + column, inside)
    if residual is not None:
        tl.store(total + at * width + column, v.to(total.dtype.element_ty), mask=inside)
    if mean_out is not None:
        mean = tl.sum(v, 1) / width
        tl.store(mean_out + row, mean, mask=live)
        v = tl.where(inside, v - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(v * v, 1) / width + eps)
    tl.store(rstd_out + row, rstd, mask=live)
    v = v * rstd[:, None] * widen(tl.load(weight + column, mask=column < width, other=0.0))
    if bias is not None:
        v += widen(tl.load(bias + column, mask=column < width, other=0.0))
    tl.store(y + at * width + column, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_forward_wide(
    x, residual, weight, bias, total, y, rstd_out, mean_out, rows, width, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program, WIDTH columns at a time."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, at = row < rows, row[:, None]
    mean = tl.zeros([ROWS], rstd_out.dtype.element_ty)
    if mean_out is not None:
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)[None, :]
            inside = live[:, None] & (column < width)
            mean += tl.sum(_sum(x, residual, total, at * x_stride + column, at * residual_stride + column, inside), 1)
        mean = mean / width
        tl.store(mean_out + row, mean, mask=live)
    square = tl.zeros([ROWS], rstd_out.dtype.element_ty)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = live[:, None] & (column < width)
        v = _sum(x, residual, total, at * x_stride + column, at * residual_stride + column, inside)
        v = tl.where(inside, v - mean[:, None], 0.0)
        square += tl.sum(v * v, 1)
    rstd = 1.0 / tl.sqrt(square / width + eps)
    tl.store(rstd_out + row, rstd, mask=live)
    for start in range(0, width, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = live[:, None] & (column < width)
        v = _sum(x, residual, total, at * x_stride + column, at * residual_stride + column, inside)
        if residual is not None:
            tl.store(total + at * width + column, v.to(total.dtype.element_ty), mask=inside)
        v = (v - mean[:, None]) * rstd[:, None] * widen(tl.load(weight + column, mask=column < width, other=0.0))
        if bias is not None:
            v += widen(tl.load(bias + column, mask=column < width, other=0.0))
        tl.store(y + at * width + column, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _load_pair(grad, x, weight, mean, rstd, at, column, inside, width, grad_stride, x_stride):
    """g, xhat and w * g of a tile, zero outside but for xhat."""
    g = widen(tl.load(grad + at * grad_stride + column, mask=inside, other=0.0))
    xhat = widen(tl.load(x + at * x_stride + column, mask=inside, other=0.0))
    if mean is not None:
        xhat = xhat - mean[:, None]
    xhat = xhat * rstd[:, None]
    return g, xhat, g * widen(tl.load(weight + column, mask=column < width, other=0.0))


@triton.jit
def _norm_backward(
    grad, grad_total, x, weight, rstd_in, mean_in, dx, dw, db, rows, width, grad_stride, total_stride, x_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row blocks in turns, ROWS whole rows at a time; the sums of dw and db stay in registers.

    STAGES - 1 blocks are on their way from memory while one is computed.
    """
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    dw_sum = tl.zeros([ROWS, WIDTH], rstd_in.dtype.element_ty)
    db_sum = tl.zeros([ROWS, WIDTH], rstd_in.dtype.element_ty)
    for block in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        live, at = row < rows, row[:, None]
        inside = live[:, None] & (column < width)
        rstd = tl.load(rstd_in + row, mask=live, other=0.0)
        mean = None if mean_in is None else tl.load(mean_in + row, mask=live, other=0.0)
        g, xhat, wg = _load_pair(grad, x, weight, mean, rstd, at, column, inside, width, grad_stride, x_stride)
        d = wg - xhat * (tl.sum(xhat * wg, 1) / width)[:, None]
        if mean_in is not None:
            d -= (tl.sum(wg, 1) / width)[:, None]
        d *= rstd[:, None]
        if grad_total is not None:
            d += widen(tl.load(grad_total + at * total_stride + column, mask=inside, other=0.0))
        tl.store(dx + at * width + column, d.to(dx.dtype.element_ty), mask=inside)
        if dw is not None:
            dw_sum += g * xhat
        if db is not None:
            db_sum += g
    part = program.to(tl.int64) * width + tl.arange(0, WIDTH)
    if dw is not None:
        tl.store(dw + part, tl.sum(dw_sum, 0).to(dw.dtype.element_ty), mask=tl.arange(0, WIDTH) < width)
    if db is not None:
        tl.store(db + part, tl.sum(db_sum, 0).to(db.dtype.element_ty), mask=tl.arange(0, WIDTH) < width)


@triton.jit
def _add_to(sums, at, value, inside, first):
    """Add to what this program wrote before; the first time nothing is there."""
    old = tl.load(sums + at, mask=inside & (not first), other=0.0)
    tl.store(sums + at, (old + value).to(sums.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward_wide(
    grad, grad_total, x, weight, rstd_in, mean_in, dx, dw, db, rows, width, grad_stride, total_stride, x_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Row blocks in turns, WIDTH columns at a time; the sums of dw and db wait in the cache."""
    program = tl.program_id(0)
    for block in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        live, at = row < rows, row[:, None]
        rstd = tl.load(rstd_in + row, mask=live, other=0.0)
        mean = None if mean_in is None else tl.load(mean_in + row, mask=live, other=0.0)
        dot = tl.zeros([ROWS], rstd_in.dtype.element_ty)
        flat = tl.zeros([ROWS], rstd_in.dtype.element_ty)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)[None, :]
            inside = live[:, None] & (column < width)
            g, xhat, wg = _load_pair(grad, x, weight, mean, rstd, at, column, inside, width, grad_stride, x_stride)
            dot += tl.sum(xhat * wg, 1)
            flat += tl.sum(wg, 1)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)[None, :]
            inside = live[:, None] & (column < width)
            g, xhat, wg = _load_pair(grad, x, weight, mean, rstd, at, column, inside, width, grad_stride, x_stride)
            d = wg - xhat * (dot / width)[:, None]
            if mean_in is not None:
                d -= (flat / width)[:, None]
            d *= rstd[:, None]
            if grad_total is not None:
                d += widen(tl.load(grad_total + at * total_stride + column, mask=inside, other=0.0))
            tl.store(dx + at * width + column, d.to(dx.dtype.element_ty), mask=inside)
            columns = start + tl.arange(0, WIDTH)
            part = program.to(tl.int64) * width + columns
            if dw is not None:
                _add_to(dw, part, tl.sum(g * xhat, 0), columns < width, block == program)
            if db is not None:
                _add_to(db, part, tl.sum(g, 0), columns < width, block == program)


def _configuration(op: str, like: Tensor, width: int) -> tuple[dict[str, Any], bool]:
    """Launch options for rows of a width, and whether they take it by chunks."""
    options = tuning.options(op, architecture(like.device), width=width)
    wide = "WIDTH" in options
    return options if wide else {**options, "WIDTH": triton.next_power_of_2(width)}, wide


class Normalise(torch.autograd.Function):
    """``y``, or ``(x + residual, y)`` with a residual; mean is taken off if ``centred``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, centred: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"the residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}: they must be equal")
        x2, weight, bias = rows_of(x), weight.contiguous(), None if bias is None else bias.contiguous()
        rows, width = x2.shape
        dtype = x.dtype if residual is None else torch.result_type(x, residual)
        r2 = total = None
        if residual is not None:
            r2, total = rows_of(residual), x.new_empty(x2.shape, dtype=dtype)
        y = x.new_empty(x2.shape, dtype=dtype)
        rstd = x.new_empty(rows, dtype=computing_type(dtype))
        mean = torch.empty_like(rstd) if centred else None
        options, wide = _configuration("norm_forward", x2, width)
        launch(
            _norm_forward_wide if wide else _norm_forward, (triton.cdiv(rows, options["ROWS"]),),
            x2, r2, weight, bias, total, y, rstd, mean, rows, width, x2.stride(0), 0 if r2 is None else r2.stride(0),
            eps, **options,
        )  # fmt: skip
        ctx.save_for_backward(x2 if total is None else total, weight, rstd, mean)
        ctx.shape, ctx.biased = x.shape, bias is not None
        return y.view(x.shape) if total is None else (total.view(x.shape), y.view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, rstd, mean = ctx.saved_tensors
        grad, grad_total = grads[-1], grads[0] if len(grads) == 2 else None
        if grad is None:  # only the sum was used, or nothing
            return grad_total, grad_total if len(grads) == 2 else None, None, None, None, None
        g2, t2 = rows_of(grad), None if grad_total is None else rows_of(grad_total)
        rows, width = x.shape
        options, wide = _configuration("norm_backward", x, width)
        programs = min(options.pop("PROGRAMS"), triton.cdiv(rows, options["ROWS"]))
        wanted = ctx.needs_input_grad[2], ctx.biased and ctx.needs_input_grad[3]
        # One program's sums are whole: no second launch, so they are rounded at once.
        parts = rstd.new_empty(sum(wanted), programs, width, dtype=weight.dtype if programs == 1 else rstd.dtype)
        dw, db = parts[0] if wanted[0] else None, parts[-1] if wanted[1] else None
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        launch(
            _norm_backward_wide if wide else _norm_backward, (programs,),
            g2, t2, x, weight, rstd, mean, dx, dw, db, rows, width, g2.stride(0), 0 if t2 is None else t2.stride(0),
            x.stride(0), **options,
        )  # fmt: skip
        sums = iter(sum_rows(parts, weight.dtype) if any(wanted) else ())
        dweight, dbias = (next(sums) if want else None for want in wanted)
        dx = dx.view(ctx.shape)
        return dx, dx if len(grads) == 2 else None, dweight, dbias, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the eager one: one launch forward, two backward. Copies x where its leading dimensions do not fold."""
    out: Tensor = Normalise.apply(x, None, weight, None, eps, False)  # type: ignore[no-untyped-call]
    return out


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the eager one, in as many launches as without the sum, which is rounded before it is used."""
    out: tuple[Tensor, Tensor] = Normalise.apply(x, residual, weight, None, eps, False)  # type: ignore[no-untyped-call]
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As the eager one: one launch forward, two backward. Copies x where its leading dimensions do not fold."""
    out: Tensor = Normalise.apply(x, None, weight, bias, eps, True)  # type: ignore[no-untyped-call]
    return out


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """As the eager one, in as many launches as without the sum, which is rounded before it is used."""
    out: tuple[Tensor, Tensor] = Normalise.apply(x, residual, weight, bias, eps, True)  # type: ignore[no-untyped-call]
    return out
