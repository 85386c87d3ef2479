"""Rotary position embedding on the fused query/key/value projection.

With a head's channels split into halves (u, v) and the angle a = position * theta^(-2i/d) of channel i:

    u' = u cos a - v sin a        v' = v cos a + u sin a

Source: Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2, with the pairs (i, i + d/2), the layout of
the published Llama checkpoints in the transformers format. The inverse turns by -a, and is the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rope_tables(
    positions: int, head_dim: int, theta: float, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``[positions, head_dim / 2]``; angles are computed in fp64, so any dtype is rounded once."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), theta ** (-channel / head_dim))
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> None:
    """Turn the last dimension of x into ``out`` (not overlapping x); cos and sin broadcast over its halves.

    Computed in the dtype of the tables, rounded once to that of ``out``.
    """
    (u, v), (du, dv) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    sign = 1 if inverse else -1
    if x.dtype != cos.dtype:
        u, v = u.to(cos.dtype), v.to(cos.dtype)
        du.copy_((u * cos).addcmul_(v, sin, value=sign))
        dv.copy_((v * cos).addcmul_(u, sin, value=-sign))
        return
    torch.mul(u, cos, out=du).addcmul_(v, sin, value=sign)
    torch.mul(v, cos, out=dv).addcmul_(u, sin, value=-sign)


def split_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into heads and rotate queries and keys.

    qkv: ``[a, b, (heads + 2 kv_heads) * d]``, queries first; cos, sin: broadcast against ``[a, b, 1, d / 2]``.
    Returns q ``[a, b, heads, d]`` and k, v ``[a, b, kv_heads, d]``, none of which shares memory with qkv: v is
    copied, so that qkv need not be kept.
    """
    out: tuple[Tensor, Tensor, Tensor] = SplitRotate.apply(qkv, cos, sin, heads, kv_heads)  # type: ignore[no-untyped-call]
    return out


class SplitRotate(torch.autograd.Function):
    """One node for split and rotation: the backward writes the fused gradient in place of a concatenation."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tables = cos, sin
        ctx.sizes = heads, kv_heads, kv_heads
        ctx.shape = qkv.shape
        x = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, -1)
        out = torch.empty_like(x)
        turned = heads + kv_heads
        rotate(out[:, :, :turned], x[:, :, :turned], cos, sin)
        out[:, :, turned:] = x[:, :, turned:]
        return out[:, :, :heads], out[:, :, heads:turned], out[:, :, turned:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.tables
        heads, kv_heads, _ = ctx.sizes
        grad = dq.new_empty(ctx.shape)
        q, k, v = torch.split(grad.view(*ctx.shape[:2], heads + 2 * kv_heads, -1), ctx.sizes, dim=2)
        rotate(q, dq, cos, sin, inverse=True)
        rotate(k, dk, cos, sin, inverse=True)
        v.copy_(dv)
        return grad, None, None, None, None
