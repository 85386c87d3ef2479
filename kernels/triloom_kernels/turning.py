"""Kernels of :mod:`triloom_kernels.rope`: a fused projection split into heads, queries and keys turned, in one pass.

A program takes one token: its cosines and sines are read (or computed) once and serve all heads. The backward is the
same kernel the other way round, with the sines negated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tuning
from .launching import architecture, launch, tl, triton
from .rows import widen


@triton.jit
def _turn_heads(
    fused, split, fused_at, split_at, head_stride, count, cos, sin, width, turned,
    FORWARD: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Turn ``count`` heads from the fused to the split side, or back; cos, sin: ``[1, HALF]``. REST: 0 if all turn."""
    half = turned // 2
    for start in range(0, count, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        packed, apart = fused + fused_at + head * width, split + split_at + head.to(tl.int64) * head_stride
        source, target = (packed, apart) if FORWARD else (apart, packed)
        if INTERLEAVED:
            channel = tl.arange(0, 2 * HALF)[None, :]
            inside = (head < count) & (channel < turned)
            both = tl.reshape(widen(tl.load(source + channel, mask=inside, other=0.0)), [HEADS, HALF, 2])
            u, v = tl.split(both)
            both = tl.reshape(tl.join(u * cos - v * sin, v * cos + u * sin), [HEADS, 2 * HALF])
            tl.store(target + channel, both.to(fused.dtype.element_ty), mask=inside)
        else:
            channel = tl.arange(0, HALF)[None, :]
            inside = (head < count) & (channel < half)
            u = widen(tl.load(source + channel, mask=inside, other=0.0))
            v = widen(tl.load(source + half + channel, mask=inside, other=0.0))
            tl.store(target + channel, (u * cos - v * sin).to(fused.dtype.element_ty), mask=inside)
            tl.store(target + half + channel, (v * cos + u * sin).to(fused.dtype.element_ty), mask=inside)
        if REST:
            channel = turned + tl.arange(0, REST)[None, :]
            inside = (head < count) & (channel < width)
            tl.store(target + channel, tl.load(source + channel, mask=inside), mask=inside)


@triton.jit
def _copy_heads(
    fused, split, fused_at, split_at, head_stride, count, width,
    FORWARD: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    for start in range(0, count, HEADS):
        head, channel = start + tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
        inside = (head < count) & (channel < width)
        packed = fused + fused_at + head * width + channel
        apart = split + split_at + head.to(tl.int64) * head_stride + channel
        if FORWARD:
            tl.store(apart, tl.load(packed, mask=inside), mask=inside)
        else:
            tl.store(packed, tl.load(apart, mask=inside), mask=inside)


@triton.jit
def _series(z, ODD: tl.constexpr):
    """Taylor series of cos(x), or of sin(x) / x if ODD, in z = x^2 <= (pi / 4)^2, to the last bit of fp64."""
    total = z * 0.0 + 1.0
    for n in tl.static_range(9):
        if ODD:
            total = 1.0 - z * total * (1.0 / ((18 - 2 * n) * (19 - 2 * n)))
        else:
            total = 1.0 - z * total * (1.0 / ((18 - 2 * n) * (17 - 2 * n)))
    return total


@triton.jit
def _angles(position, turned, fused, LOG2_THETA: tl.constexpr, HALF: tl.constexpr):
    """cos and sin, ``[1, HALF]``. Turns are reduced to an eighth in fp64, so that far positions are as exact as near.

    The library's functions would carry a reduction for large arguments, and local memory with it.
    """
    channel = tl.arange(0, HALF)[None, :].to(tl.float64)
    turns = position.to(tl.float64) * tl.exp2(channel * (-2.0 * LOG2_THETA) / turned) * 0.15915494309189535
    turns -= tl.floor(turns)
    quarter = tl.floor(turns * 4.0 + 0.5)
    x = (turns - quarter * 0.25) * 6.283185307179586
    if fused.dtype.element_ty != tl.float64:
        x = x.to(tl.float32)
    c, s = _series(x * x, False), x * _series(x * x, True)
    place = quarter.to(tl.int32)
    cos, sin = tl.where((place & 1) != 0, s, c), tl.where((place & 1) != 0, c, s)
    return tl.where(((place + 1) & 2) != 0, -cos, cos), tl.where((place & 2) != 0, -sin, sin)


@triton.jit
def _split_rotate(
    fused, q, k, v, cos, sin, second, heads, kv_heads, width, turned, first,
    q0, q1, q2, k0, k1, k2, v0, v1, v2, table0, table1,
    LOG2_THETA: tl.constexpr, ALONG: tl.constexpr, FORWARD: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The token at (i, j) of ``[a, second]``; q0, q1, q2 are the strides of q over i, j and heads."""
    token = tl.program_id(0)
    i, j = (token // second).to(tl.int64), (token % second).to(tl.int64)
    if cos is not None:
        channel = tl.arange(0, HALF)[None, :]
        at, live = i * table0 + j * table1 + channel, channel < turned // 2
        c = widen(tl.load(cos + at, mask=live, other=0.0))
        s = widen(tl.load(sin + at, mask=live, other=0.0))
    else:
        c, s = _angles(first + (i if ALONG == 0 else j), turned, fused, LOG2_THETA, HALF)
    if not FORWARD:
        s = -s
    at = token.to(tl.int64) * (heads + 2 * kv_heads) * width
    key_at, value_at = at + heads * width, at + (heads + kv_heads) * width
    _turn_heads(fused, q, at, i * q0 + j * q1, q2, heads, c, s, width, turned, FORWARD, INTERLEAVED, HEADS, HALF, REST)
    _turn_heads(
        fused, k, key_at, i * k0 + j * k1, k2, kv_heads, c, s, width, turned, FORWARD, INTERLEAVED, HEADS, HALF, REST
    )
    _copy_heads(fused, v, value_at, i * v0 + j * v1, v2, kv_heads, width, FORWARD, HEADS, WIDTH)


@dataclass(frozen=True)
class Turn:
    """How a projection is turned: everything but the data."""

    heads: int
    kv_heads: int
    turned: int
    interleaved: bool
    tables: tuple[Tensor, Tensor] | None = None
    """cos and sin, ``[a, b, 1, turned / 2]`` of equal strides; without them angles follow from what is below."""
    theta: float = 1.0
    along: int = 1
    first: int = 0

    def launch(self, fused: Tensor, parts: tuple[Tensor, ...], *, forward: bool) -> None:
        """fused: ``[a, b, heads + 2 kv_heads, d]``, contiguous; parts: q, k, v, last dimension contiguous."""
        a, b, _, width = fused.shape
        rest = width - self.turned
        strides = [n for t in parts for n in t.stride()[:3]]
        cos, sin = self.tables or (None, None)
        strides += (0, 0) if cos is None else cos.stride()[:2]
        options = tuning.options("split_rotate", architecture(fused.device), head_dim=width)
        launch(
            _split_rotate, (a * b,), fused, *parts, cos, sin, b, self.heads, self.kv_heads, width,
            self.turned, self.first, *strides, LOG2_THETA=math.log2(self.theta), ALONG=self.along,
            FORWARD=forward, INTERLEAVED=self.interleaved, HALF=triton.next_power_of_2(self.turned // 2),
            REST=triton.next_power_of_2(rest) if rest else 0, WIDTH=triton.next_power_of_2(width), **options,
        )  # fmt: skip


class SplitRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turn: Turn) -> tuple[Tensor, ...]:
        heads = turn.heads + 2 * turn.kv_heads
        if qkv.dim() != 3 or qkv.shape[-1] % heads or not 0 < turn.turned <= qkv.shape[-1] // heads or turn.turned % 2:
            raise ValueError(
                f"a projection of shape {tuple(qkv.shape)} must be [a, b, {heads} heads * d] with an even number of "
                f"turned channels up to d, got {turn.turned}"
            )
        ctx.turn, ctx.shape = turn, qkv.shape
        x = qkv.contiguous().view(*qkv.shape[:2], heads, -1)
        parts = torch.split(torch.empty_like(x), [turn.heads, turn.kv_heads, turn.kv_heads], 2)
        turn.launch(x, parts, forward=True)
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        turn, parts = ctx.turn, tuple(g if g.stride(-1) == 1 else g.contiguous() for g in grads)
        grad = parts[0].new_empty(*ctx.shape[:2], turn.heads + 2 * turn.kv_heads, parts[0].shape[-1])
        turn.launch(grad, parts, forward=False)
        return grad.view(ctx.shape), None


def split_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, interleaved: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As the eager one: one launch each way. Copies a projection that is not contiguous.

    Raises ValueError for tables that do not fit.
    """
    cos, sin = (t.expand(*qkv.shape[:2], 1, -1) for t in (cos, sin))  # a stride of 0 where they broadcast
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    turn = Turn(heads, kv_heads, 2 * cos.shape[-1], interleaved, (cos, sin))
    q, k, v = SplitRotate.apply(qkv, turn)  # type: ignore[no-untyped-call]
    return q, k, v


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
    """As the eager one, angles computed in the kernel: no table is made or read. Positions below 2^31."""
    turn = Turn(heads, kv_heads, turned, interleaved, None, theta, along, first)
    q, k, v = SplitRotate.apply(qkv, turn)  # type: ignore[no-untyped-call]
    return q, k, v
