"""Attention in torch operations, with every option of the kernels, any floating-point dtype, on any device.

Scores are materialised: memory grows with the product of the lengths.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Packed, check


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    packed: Packed | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of each head; the row of the table for devices without kernels.

    Arguments and result as of :func:`triloom_kernels.attention.flash.flash_attention`. Torch's own
    ``scaled_dot_product_attention`` computes what it can express: whole sequences of equal lengths without a window.
    """
    if window is None and packed is None and (not causal or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return attention_with_lse(q, k, v, causal=causal, window=window, scale=scale, packed=packed)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    packed: Packed | None = None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` by the formula, 16-bit inputs computed in fp32; arguments as of the kernels' function."""
    check(q, k, v, window, packed)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    if packed is None:
        return _dense(q, k, v, causal, window, scale)
    parts = [
        _dense(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], causal, window, scale)
        for (a, b), (c, d) in zip(_ranges(packed.starts_q), _ranges(packed.starts_k), strict=True)
    ]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _ranges(starts: Tensor) -> list[tuple[int, int]]:
    at: list[int] = starts.tolist()
    return list(itertools.pairwise(at))


def seen(m: int, n: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """``[m, n]`` bool: whether a query sees a key; the last query stands at the last key."""
    back = torch.arange(m, device=device).unsqueeze(1) + (n - m) - torch.arange(n, device=device)
    out = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    return out if window is None else out & (back.abs() < window)


def _dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    computing = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = (t.to(computing).repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.matmul(q.to(computing) * scale, k.transpose(-2, -1))
    scores = scores.masked_fill(~seen(q.shape[2], k.shape[2], causal, window, q.device), -math.inf)
    lse = torch.logsumexp(scores, -1)
    # A query that sees nothing: exp(-inf - 0) = 0 without a nan in the backward.
    shift = lse.masked_fill(lse == -math.inf, 0)
    out = torch.matmul((scores - shift.unsqueeze(-1)).exp(), v)
    return out.to(q.dtype), lse
