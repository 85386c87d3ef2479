"""Rotary embedding fused with the split: tables or theta, halves or neighbours, all channels or some."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triloom_kernels import turning
from triloom_kernels.rope import rope_tables

from . import common
from .common import CubinCase, backward, meta


class Shape(NamedTuple):
    a: int
    b: int
    heads: int
    kv_heads: int
    width: int
    turned: int
    interleaved: bool
    along: int
    """Dimension that positions follow: 1 for batch first."""
    first: int = 0

    @property
    def whole(self) -> tuple[int, int, int]:
        return self.a, self.b, (self.heads + 2 * self.kv_heads) * self.width


THETA = 500.0


def drawn(count: int, seed: int) -> list[Shape]:
    rng = random.Random(seed)
    out = []
    for i in range(count):
        kv_heads, width = rng.choice([1, 2, 3]), rng.choice([2, 6, 16, 24, 64])
        turned = width if i % 2 else rng.choice([n for n in (2, 4, 6, 16, 20, 64) if n <= width])
        heads, a, b = kv_heads * rng.choice([1, 2, 5]), rng.choice([1, 2, 3]), rng.choice([1, 3, 5])
        first = rng.choice([0, 7, 100_003])
        out.append(Shape(a, b, heads, kv_heads, width, turned, i % 3 == 0, rng.choice([0, 1]), first))
    return out


def tables(shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """As the runtime has them: cut from longer tables, broadcasting over the batch."""
    n = (shape.a, shape.b)[shape.along]
    made = rope_tables(n + 2, shape.turned, THETA, dtype=dtype, device=torch.device(device), first=shape.first)
    cos, sin = (t[:n].unsqueeze(1).unsqueeze(1 - shape.along) for t in made)
    return cos, sin


def formula(qkv: Tensor, cos: Tensor, sin: Tensor, shape: Shape) -> tuple[Tensor, ...]:
    """Pairs as complex numbers, times exp(i angle)."""
    x = qkv.view(shape.a, shape.b, -1, shape.width)
    pairs, dim = ((-1, 2), -1) if shape.interleaved else ((2, -1), -2)
    z = torch.complex(*x[..., : shape.turned].unflatten(-1, pairs).unbind(dim)) * torch.complex(cos, sin)
    turned = torch.stack((z.real, z.imag), dim).flatten(-2)
    y = torch.cat((turned, x[..., shape.turned :]), -1)
    parts = shape.heads, shape.kv_heads, shape.kv_heads
    (q, k, _), (_, _, values) = y.split(parts, 2), x.split(parts, 2)  # type: ignore[no-untyped-call]
    return q, k, values


def check(shape: Shape, dtype: torch.dtype, device: str, *, computed: bool, seed: int = 0) -> None:
    """Gradients come as attention gives them: heads before the sequence in memory."""
    cos, sin = tables(shape, torch.promote_types(dtype, torch.float32), device)
    exact = tables(shape, torch.float64, device)

    def own(qkv: Tensor) -> Any:
        if computed:
            return turning.split_rotate_computed(
                qkv, THETA, shape.turned, shape.heads, shape.kv_heads, shape.interleaved,
                along=shape.along, first=shape.first,
            )  # fmt: skip
        return turning.split_rotate(qkv, cos, sin, shape.heads, shape.kv_heads, shape.interleaved)

    qkv = common.draw(*shape.whole, seed=seed, dtype=dtype, device=device)
    common.compare(
        own, lambda x: formula(x, *exact, shape), [qkv], grads=lambda g: g.transpose(1, 2).contiguous().transpose(1, 2)
    )


def check_strides(device: str) -> None:
    """A projection that is not contiguous, tables with a row for every token, gradients of other strides."""
    shape = Shape(2, 3, 4, 2, 8, 8, False, 1)
    qkv = common.draw(3, 2, 64, seed=1, dtype=torch.float32, device=device).transpose(0, 1)
    angle = common.draw(2, 3, 1, 4, seed=2, dtype=torch.float64, device=device)
    cos, sin = angle.cos().float(), angle.sin().float().transpose(0, 1).contiguous().transpose(0, 1)
    for grads in (lambda g: g[..., :1].expand_as(g), lambda g: g.flip(0), lambda g: g.mT.contiguous().mT):
        common.compare(
            lambda x: turning.split_rotate(x, cos, sin, 4, 2),
            lambda x: formula(x.contiguous(), angle.cos(), angle.sin(), shape),
            [qkv],
            grads=grads,
        )


def cubin(*, interleaved: bool, partial: bool, computed: bool) -> CubinCase:
    def run(head_dim: int = 128) -> None:
        heads, kv_heads, turned = 32, 8, head_dim // 2 if partial else head_dim
        qkv = meta(4, 2048, (heads + 2 * kv_heads) * head_dim)
        if computed:
            backward(*turning.split_rotate_computed(qkv, 10000.0, turned, heads, kv_heads, interleaved))
            return
        cos, sin = (torch.empty(1, 2048, 1, turned // 2, device="meta") for _ in range(2))
        backward(*turning.split_rotate(qkv, cos, sin, heads, kv_heads, interleaved))

    return CubinCase(run, ("split_rotate",))


CUBINS = {
    "split_rotate": cubin(interleaved=False, partial=False, computed=False),
    "split_rotate_computed": cubin(interleaved=True, partial=True, computed=True),
}
