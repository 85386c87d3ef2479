"""Rotary position embedding on the fused query/key/value projection.

With a head's channels split into halves (u, v) and the angle a = position * theta^(-2i/d) of channel i:

    u' = u cos a - v sin a        v' = v cos a + u sin a

Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2, with the pairs (i, i + d/2), the layout of
the published Llama checkpoints in the transformers format; interleaved, the pairs are (2i, 2i + 1), as in the paper.
The inverse turns by -a, and is the gradient. Tables of fewer than d / 2 columns turn the first channels only. The
kernels are in :mod:`triloom_kernels.turning`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_tables(
    positions: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``[positions, head_dim / 2]``; angles are computed in fp64, so any dtype is rounded once.

    head_dim: channels that are turned. first: the position of the first row.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(first, first + positions, dtype=torch.float64), theta ** (-channel / head_dim))
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(
    out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, interleaved: bool = False
) -> None:
    """Turn the last dimension of x into ``out`` (not overlapping x); cos and sin broadcast over half of it.

    Computed in the dtype of the tables, rounded once to that of ``out``.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        out[..., turned:] = x[..., turned:]
        x, out = x[..., :turned], out[..., :turned]
    (u, v), (du, dv) = _pairs(x, interleaved), _pairs(out, interleaved)
    sign = 1 if inverse else -1
    if x.dtype != cos.dtype:
        u, v = u.to(cos.dtype), v.to(cos.dtype)
        du.copy_((u * cos).addcmul_(v, sin, value=sign))
        dv.copy_((v * cos).addcmul_(u, sin, value=-sign))
        return
    torch.mul(u, cos, out=du).addcmul_(v, sin, value=sign)
    torch.mul(v, cos, out=dv).addcmul_(u, sin, value=-sign)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return x[..., ::2], x[..., 1::2]
    u, v = x.chunk(2, dim=-1)
    return u, v


def split_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and rotate queries and keys.

    qkv: ``[a, b, (heads + 2 kv_heads) * d]``, queries first; cos, sin: broadcast against ``[a, b, 1, r / 2]``, where
    the first r <= d channels of a head are turned.
    Returns q ``[a, b, heads, d]`` and k, v ``[a, b, kv_heads, d]``, none of which shares memory with qkv: v is
    copied, so that qkv need not be kept.
    """
    out: tuple[Tensor, Tensor, Tensor] = SplitRotate.apply(qkv, cos, sin, heads, kv_heads, interleaved)  # type: ignore[no-untyped-call]
    return out


def split_rotate_computed(
    qkv: Tensor,
    theta: float,
    turned: int,
    heads: int,
    kv_heads: int,
    interleaved: bool = False,
    *,
    along: int = 1,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`split_rotate` without tables. turned: channels r; along: the dimension of qkv, 0 or 1, that positions
    follow, from ``first`` on.
    """
    wide = torch.promote_types(qkv.dtype, torch.float32)
    tables = rope_tables(qkv.shape[along], turned, theta, dtype=wide, device=qkv.device, first=first)
    cos, sin = (t.unsqueeze(1).unsqueeze(1 - along) for t in tables)
    return split_rotate(qkv, cos, sin, heads, kv_heads, interleaved)


class SplitRotate(torch.autograd.Function):
    """One node for split and rotation: the backward writes the fused gradient in place of a concatenation."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tables, ctx.interleaved = (cos, sin), interleaved
        ctx.sizes = heads, kv_heads, kv_heads
        ctx.shape = qkv.shape
        x = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, -1)
        out = torch.empty_like(x)
        turned = heads + kv_heads
        rotate(out[:, :, :turned], x[:, :, :turned], cos, sin, interleaved=interleaved)
        out[:, :, turned:] = x[:, :, turned:]
        return out[:, :, :heads], out[:, :, heads:turned], out[:, :, turned:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.tables
        heads, kv_heads, _ = ctx.sizes
        grad = dq.new_empty(ctx.shape)
        q, k, v = torch.split(grad.view(*ctx.shape[:2], heads + 2 * kv_heads, -1), ctx.sizes, dim=2)
        rotate(q, dq, cos, sin, inverse=True, interleaved=ctx.interleaved)
        rotate(k, dk, cos, sin, inverse=True, interleaved=ctx.interleaved)
        v.copy_(dv)
        return grad, None, None, None, None, None
