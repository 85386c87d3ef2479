"""The parts of the cross-entropy by kernels: one pass over the logits forward, one backward that overwrites them.

Nothing of the logits' size is kept but the logits: the backward computes the probabilities again from the row's
maximum and sum, which the forward finds online: Milakov and Gimelshein, "Online normalizer calculation for softmax",
arXiv 1805.02867, algorithm 3. Rows may have any length, 128k and more, and none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import tuning
from .cross_entropy import Parts, Statistics, Terms
from .launching import architecture, launch, tl, triton
from .rows import computing_type, widen


@triton.jit
def _row_statistics(row, v, WIDTH: tl.constexpr, TOTAL: tl.constexpr, WIDE: tl.constexpr):
    """``(largest, sum of exp(x - largest), sum of x)`` of a row of v logits; (-inf, 0, 0) of none."""
    column = tl.arange(0, WIDTH)
    largest = tl.full((), float("-inf"), WIDE)
    sums = tl.zeros((WIDTH,), WIDE)
    totals = tl.zeros((WIDTH,), WIDE)
    for start in range(0, v, WIDTH):
        inside = start + column < v
        x = widen(tl.load(row + start + column, mask=inside, other=float("-inf")))
        above = tl.maximum(largest, tl.max(x, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        sums = sums * tl.exp(largest - base) + tl.exp(x - base)
        if TOTAL:
            totals += tl.where(inside, x, 0.0)
        largest = above
    return largest, tl.sum(sums, 0), tl.sum(totals, 0)


@triton.jit
def loss_statistics_kernel(
    logits, local, largest, log_top, target, total, base, shift, by_row, v,
    WIDTH: tl.constexpr, WHOLE: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """A program: one row."""
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * by_row
    top, z, sum_x = _row_statistics(row, v, WIDTH, TOTAL, largest.dtype.element_ty)
    nothing = z == 0.0  # not by top: a row of nan has none either
    minus_log = -tl.log(tl.where(nothing, 1.0, z))
    if WHOLE:  # a whole row of -inf has no probabilities; a shard of one has none of its own
        minus_log = tl.where(nothing, float("nan"), minus_log)
    index = tl.load(local + n)
    held = index >= 0
    tl.store(largest + n, top)
    tl.store(log_top + n, minus_log)
    # For exp(x - base + shift), 0 where there is nothing. Two numbers: large logits would lose digits in one.
    tl.store(base + n, tl.where(nothing, 0.0, top))
    tl.store(shift + n, tl.where(nothing, float("-inf"), minus_log))
    tl.store(target + n, widen(tl.load(row + tl.where(held, index, 0), mask=held, other=0.0)))
    if TOTAL:
        tl.store(total + n, sum_x)


@triton.jit
def _store_gradient(row, out, start, v, base, shift, scale, taken, uniform, index, WIDTH: tl.constexpr):
    column = start + tl.arange(0, WIDTH)
    x = widen(tl.load(row + column, mask=column < v, other=float("-inf")))
    g = tl.exp(x - base + shift) * scale - uniform
    g = tl.where(column == index, g - taken, g)
    tl.store(out + column, g.to(out.dtype.element_ty), mask=column < v)


@triton.jit
def loss_gradient_kernel(
    logits, out, local, base, shift, scale, taken, uniform, by_row, out_by_row, v, chunks,
    WIDTH: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """A program: WIDTH logits of a row."""
    program = tl.program_id(0)
    n = program // chunks
    start = program % chunks * WIDTH
    wide = n.to(tl.int64)
    even = 0.0
    if UNIFORM:
        even = tl.load(uniform + n)
    _store_gradient(
        logits + wide * by_row, out + wide * out_by_row, start, v, tl.load(base + n), tl.load(shift + n),
        tl.load(scale + n), tl.load(taken + n), even, tl.load(local + n), WIDTH,
    )  # fmt: skip


@triton.jit
def loss_and_gradient_kernel(
    logits, local, ignored, losses, by_row, v, smoothing, z_loss,
    WIDTH: tl.constexpr, TOTAL: tl.constexpr,
):  # fmt: skip
    """A program: loss of a row over the whole vocabulary, and its gradient in place of the logits.

    The second reading comes from the L2 cache: the rows that are under way at a time fit into it.
    """
    n = tl.program_id(0)
    row = logits + n.to(tl.int64) * by_row
    index = tl.load(local + n)
    counts = tl.load(ignored + n) == 0
    x_target = widen(tl.load(row + tl.maximum(index, 0)))  # before the reductions, after which others overwrite it
    top, z, sum_x = _row_statistics(row, v, WIDTH, TOTAL, losses.dtype.element_ty)
    log_sum = top + tl.log(z)
    loss = (log_sum - x_target) + smoothing * (x_target - sum_x / v) + z_loss * log_sum * log_sum
    tl.store(losses + n, tl.where(counts, loss, 0.0))
    weight = tl.where(counts, 1.0, 0.0)
    scale = weight * (1.0 + 2.0 * z_loss * log_sum)
    for start in range(0, v, WIDTH):
        _store_gradient(
            row, row, start, v, top, -tl.log(z), scale, weight * (1.0 - smoothing), weight * smoothing / v, index,
            WIDTH,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def shard_statistics(
    logits: Tensor, local: Tensor, *, whole: bool, in_place: bool, with_total: bool = False
) -> Statistics:
    """As :func:`triloom_kernels.cross_entropy.shard_statistics`; reads the logits once and changes nothing.

    The backward reads them again: they must not change in between. Rows apart, columns together (otherwise copied).
    """
    logits = _rows(logits)
    n, v = logits.shape
    wide = computing_type(logits.dtype)
    largest, log_top, target, total, base, shift = torch.empty(6, n, dtype=wide, device=logits.device)
    launch(
        loss_statistics_kernel,
        (n,),
        *(logits, local, largest, log_top, target, total, base, shift, logits.stride(0), v),
        WHOLE=whole,
        TOTAL=with_total,
        **tuning.options("loss_statistics", architecture(logits.device), vocab=v),
    )
    return Statistics(largest, log_top, target, total if with_total else None, (logits, base, shift))


def shard_gradient(
    kept: tuple[Tensor, ...],
    local: Tensor,
    scale: Tensor,
    taken: Tensor,
    uniform: Tensor | None,
    *,
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """As :func:`triloom_kernels.cross_entropy.shard_gradient`."""
    logits, base, shift = kept
    n, v = logits.shape
    out = logits if in_place and logits.dtype == dtype else torch.empty(n, v, dtype=dtype, device=logits.device)
    options = tuning.options("loss_gradient", architecture(logits.device), vocab=v)
    chunks = triton.cdiv(v, options["WIDTH"])
    launch(
        loss_gradient_kernel,
        (n * chunks,),
        *(logits, out, local, base, shift, scale.contiguous(), taken.contiguous()),
        *(None if uniform is None else uniform.contiguous(), logits.stride(0), out.stride(0), v, chunks),
        UNIFORM=uniform is not None,
        **options,
    )
    return out


def whole_loss_and_gradient(logits: Tensor, local: Tensor, ignored: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """As :func:`triloom_kernels.cross_entropy.whole_loss_and_gradient`; reads memory once, writes it once."""
    given = _rows(logits)
    n, v = given.shape
    wide = computing_type(given.dtype)
    losses = torch.empty(n, dtype=wide, device=given.device)
    launch(
        loss_and_gradient_kernel,
        (n,),
        *(given, local, ignored, losses, given.stride(0), v, float(terms.smoothing), float(terms.z_loss)),
        TOTAL=terms.smoothing != 0,
        **tuning.options("loss_statistics", architecture(given.device), vocab=v),
    )
    return losses, given


KERNEL_PARTS = Parts(shard_statistics, shard_gradient, whole_loss_and_gradient)
