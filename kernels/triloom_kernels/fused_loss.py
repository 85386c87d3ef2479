"""Projection onto the vocabulary and cross-entropy in one: the logits exist for a chunk of the tokens at a time.

For each chunk of rows of x: logits = x W^T, their losses, their gradient G in place of them, and at once

    dx = G W        dW += G^T x

so that the forward holds chunk x vocabulary logits in place of all, and dx and dW (in fp32, as large as the weight)
until the backward, which scales them by the gradient of the sum. Three products as without fusion; nothing is computed
twice. With 16-bit logits G is rounded to them unscaled, so in fp16 probabilities below 6e-8 vanish: bf16 is what it is
for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy import (
    EAGER_PARTS,
    IGNORE_INDEX,
    PLAIN,
    Gather,
    Parts,
    Terms,
    UsedUpError,
    gathered,
    row_factors,
    row_losses,
)

CHUNK = 4096
"""Tokens at a time: dW is read and written once a chunk, which below this costs more than its product on a GPU."""

Writer = Callable[[Tensor, bool], None]
"""``write(out, accumulate)`` puts the weight's gradient into ``out`` or adds it."""


@dataclass(frozen=True)
class Plan:
    """How the chunks are computed."""

    vocab: int
    """Of all shards together."""
    gather: Gather | None = None
    """Of the statistics over shards of the vocabulary; None where the weight is the whole of it."""
    terms: Terms = PLAIN
    parts: Parts = EAGER_PARTS
    chunk: int = CHUNK
    hand_over: Callable[[Writer], Tensor | None] | None = None
    """Takes the writer of the weight's gradient, to be called whenever; returns what autograd gets."""


def add_product_(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """``out += grad^T x`` with sums in out's dtype. grad: ``[n, v]``; x: ``[n, h]``, the same dtype; out: ``[v, h]``.

    On CUDA 16-bit factors go to the product as they are (torch 2.8 and later); otherwise they are widened first.
    """
    if grad.dtype == out.dtype:
        out.addmm_(grad.t(), x)
    elif grad.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(out, grad.t(), x, out.dtype, out=out)
    else:
        out.addmm_(grad.to(out.dtype).t(), x.to(out.dtype))


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, local: Tensor, ignored: Tensor, plan: Plan, graded: bool
    ) -> Tensor:
        rows = x.detach().reshape(local.numel(), x.shape[-1])
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(rows) if graded and ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if graded and ctx.needs_input_grad[1] else None
        for at in range(0, len(rows), plan.chunk):
            part = slice(at, at + plan.chunk)
            logits = torch.mm(rows[part], weight.t())
            losses, grad = _losses(logits, local[part], ignored[part], plan, dx is not None or dw is not None)
            loss += losses.sum()
            if dx is not None:
                torch.mm(grad, weight, out=dx[part])
            if dw is not None:
                add_product_(dw, grad, rows[part])
        ctx.save_for_backward(dx, dw)  # for whoever counts or moves what is saved
        ctx.plan, ctx.shape, ctx.like, ctx.used = plan, x.shape, weight.dtype, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise UsedUpError("the fused loss has given its gradient away; run the forward again, not the backward")
        ctx.used = True
        dx, dw = ctx.saved_tensors
        if dx is not None:
            dx = dx.mul_(grad.to(dx.dtype)).view(ctx.shape)
        dweight = None
        if dw is not None:
            write = _writer(dw, grad)
            if ctx.plan.hand_over is not None:
                dweight = ctx.plan.hand_over(write)
            else:
                dweight = torch.empty_like(dw, dtype=ctx.like)
                write(dweight, False)
        return dx, dweight, None, None, None, None


def _losses(logits: Tensor, local: Tensor, ignored: Tensor, plan: Plan, graded: bool) -> tuple[Tensor, Tensor]:
    """Losses ``[n]`` and the gradient of their sum, if ``graded``, in place of the logits."""
    terms, vocab, parts = plan.terms, plan.vocab, plan.parts
    if plan.gather is None and graded:
        return parts.both(logits, local, ignored, terms)
    whole = plan.gather is None
    made = parts.statistics(logits, local, whole=whole, in_place=True, with_total=terms.smoothing != 0)
    foreign, share = local < 0, None
    if plan.gather is not None:
        made, share = gathered(made, foreign, plan.gather)
    losses, lse = row_losses(made, terms, vocab)
    losses = losses.masked_fill(ignored, 0)
    if graded:
        factors = row_factors(torch.ones_like(losses).masked_fill_(ignored, 0), share, foreign, lse, terms, vocab)
        logits = parts.gradient(made.kept, local, *factors, dtype=logits.dtype, in_place=True)
    return losses, logits


def _writer(dw: Tensor, grad: Tensor) -> Writer:
    def write(out: Tensor, accumulate: bool) -> None:
        factor = grad.to(dw.dtype)
        if not accumulate:
            out.copy_(dw * factor)
        elif out.dtype == dw.dtype:
            out.addcmul_(dw, factor)
        else:
            out.add_(dw * factor)

    return write


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    terms: Terms = PLAIN,
    parts: Parts = EAGER_PARTS,
    chunk: int = CHUNK,
) -> Tensor:
    """Sum of the losses of ``x weight^T`` against all targets but ``ignore_index``; 0-dim, fp32 (fp64 for fp64).

    x: ``[..., h]``; weight: ``[vocab, h]``, the same dtype; targets: ``[...]`` int64 in ``[0, vocab)``, unchecked;
    parts: eager or those of the kernels; chunk: tokens at a time. The gradient of the weight is summed over chunks in
    fp32 and rounded once. A second backward raises UsedUpError.
    """
    index = targets.reshape(-1)
    ignored = index == ignore_index
    plan = Plan(len(weight), terms=terms, parts=parts, chunk=chunk)
    return fused_loss(x, weight, index.masked_fill(ignored, -1), ignored, plan)


def fused_loss(x: Tensor, weight: Tensor, local: Tensor, ignored: Tensor, plan: Plan) -> Tensor:
    """The same on one shard of the vocabulary: the sum of all losses, on every shard; dx is this shard's term of a sum.

    weight: ``[v, h]``, v may be 0; local: ``[n]`` int64, the target's row of the weight, or -1 where it is ignored or
    another shard's; ignored: ``[n]`` bool. x and local must be equal on all shards.
    """
    if plan.chunk < 1:
        raise ValueError(f"a chunk of {plan.chunk} tokens; at least 1")
    graded = torch.is_grad_enabled()  # inside the function it never is
    loss: Tensor = FusedLoss.apply(x, weight, local, ignored, plan, graded)  # type: ignore[no-untyped-call]
    return loss
