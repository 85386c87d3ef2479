"""Attention by the kernels: the autograd function and its thin functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import tuning
from ..launching import architecture
from .backward import backward
from .forward import forward
from .problem import Packed, Problem, describe
from .reference import attention_with_lse
from .tiles import Options

KERNELS = ("forward", "dots", "dkdv", "dq")
FARTHEST = 2**31 // 256
"""Elements from row to row; a tile has 128 rows."""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    packed: Packed | None = None,
    options: Mapping[str, Options] | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of each head, without scores in memory.

    q: ``[b, heads, s, d]``; k, v: ``[b, kv_heads, t, d]``, kv_heads dividing heads (heads ``i * heads / kv_heads`` and
    the following share key head i); bfloat16, float16 or float32 (whose products are true fp32 products, not tf32, and
    slow); d up to 256. float64, which is for checks, is computed by the formula in torch operations. Any strides whose
    last is 1, otherwise a copy is made. Returns ``[b, heads, s, d]`` in the order of q's memory, computed in fp32 and
    rounded once.

    causal: a query sees no later keys; where lengths differ, the last query stands at the last key. window: a query
    sees keys at a distance below it only, itself included, on both sides if not causal. A query that sees nothing gets
    zeros. scale: of the scores, positive; 1 / sqrt(d) by default. packed: sequences behind one another, which do not
    see each other and fill the whole sequence dimension. options: tile sizes by kernel in place of the tuned ones.

    Keeps q, k, v, the result and one number per query for the backward, which is deterministic.
    Raises ValueError or TypeError for what does not fit together or the kernels cannot do.
    """
    named = {"causal": causal, "window": window, "scale": scale, "packed": packed, "options": options}
    return flash_attention_with_lse(q, k, v, **named)[0]  # type: ignore[arg-type]


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    packed: Packed | None = None,
    options: Mapping[str, Options] | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attention` and the log of each query's sum of exponentials, fp32 ``[b, heads, s]``.

    The log is -inf where nothing is seen. Both may be differentiated: with the logs, results over parts of
    the keys can be combined.
    """
    if q.dtype == torch.float64:
        return attention_with_lse(q, k, v, causal=causal, window=window, scale=scale, packed=packed)
    problem = describe(q, k, v, causal, window, scale, packed)
    tiles = dict(options) if options is not None else _tuned(q, problem)
    out: tuple[Tensor, Tensor] = FlashAttention.apply(q, k, v, problem, tiles)  # type: ignore[no-untyped-call]
    return out


def _tuned(q: Tensor, problem: Problem) -> dict[str, Options]:
    arch = architecture(q.device)
    shape = {"width": problem.width, "bytes": q.element_size()}
    return {name: tuning.options(f"attention_{name}", arch, **shape) for name in KERNELS}


def _rows(x: Tensor) -> Tensor:
    """x with neighbouring columns next to each other, and rows near enough for 32-bit offsets inside a tile."""
    return x if x.stride(-1) == 1 and x.stride(-2) < FARTHEST else x.contiguous()


class FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, problem: Problem, tiles: dict[str, Options]
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _rows(q), _rows(k), _rows(v)
        out, lse = forward(q, k, v, problem, tiles["forward"])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.problem, ctx.tiles = problem, tiles
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * 5
        grad = torch.zeros_like(saved[3]) if grad is None else _rows(grad)
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        return *backward(grad, grad_lse, saved, ctx.problem, ctx.tiles), None, None
