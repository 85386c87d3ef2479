"""Bodies of the tests of attention: against the formula in fp64, results, logs and gradients."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triloom_kernels.attention import Packed, attention_with_lse
from triloom_kernels.attention.flash import flash_attention, flash_attention_with_lse

from .common import CubinCase, backward, compare, draw, meta

GRADIENT = {torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Tolerance: probabilities and their gradients are rounded to the inputs' type before their products."""


class Shape(NamedTuple):
    """b: batch, or packed sequences of lengths up to s and t."""

    b: int
    heads: int
    kv_heads: int
    s: int
    t: int
    d: int
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    packed: bool = False


def tiles(m: int, n: int, edge: int) -> Mapping[str, dict[str, Any]]:
    """Small ones, so that short sequences have several."""
    walk = {"BLOCK_M": m, "BLOCK_N": n, "EDGE": edge, "num_warps": 4, "num_stages": 1}
    return {
        "forward": walk,
        "dkdv": walk,
        "dq": walk,
        "dots": {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1},
    }


def drawn(count: int, seed: int) -> list[Shape]:
    r = random.Random(seed)
    lengths = (1, 3, 17, 33, 47)
    out = []
    for _ in range(count):
        kv = r.choice((1, 1, 2))
        out.append(
            Shape(
                b=r.choice((1, 1, 2)),
                heads=kv * r.choice((1, 1, 2)),
                kv_heads=kv,
                s=r.choice(lengths),
                t=r.choice(lengths),
                d=r.choice((1, 8, 16, 24, 64)),
                causal=r.random() < 0.7,
                window=r.choice((None, None, 1, 5, 20)),
                scale=r.choice((None, 0.3)),
                packed=r.random() < 0.3,
            )
        )
    return out


def starts(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def packing(shape: Shape, device: str, seed: int) -> Packed | None:
    """Sequences of random lengths, empty ones among them."""
    if not shape.packed:
        return None
    r = random.Random(seed)
    q, k = ([r.choice((0, longest, r.randint(0, longest))) for _ in range(shape.b + 1)] for longest in shape[3:5])
    return Packed(starts(q, device), starts(k, device), shape.s, shape.t)


def inputs(shape: Shape, dtype: torch.dtype, device: str, packed: Packed | None, seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v of three layouts: rows of a fused projection, sequence first, heads first."""
    b, heads, kv, s, t, d = shape[:6]
    if packed is not None:
        b, s, t = 1, int(packed.starts_q[-1]), int(packed.starts_k[-1])
    q = draw(b, s, heads + 3, d, seed=seed, dtype=dtype, device=device)[:, :, :heads].transpose(1, 2)
    k = draw(t, b, kv, d, seed=seed + 1, dtype=dtype, device=device).permute(1, 2, 0, 3)
    v = draw(b, kv, t, d, seed=seed + 2, dtype=dtype, device=device)
    return q, k, v


def check(shape: Shape, dtype: torch.dtype, device: str, options: Mapping[str, Any] | None, seed: int = 0) -> None:
    """Results, logs, and the gradients of both together."""
    packed = packing(shape, device, seed)
    named = {"causal": shape.causal, "window": shape.window, "scale": shape.scale, "packed": packed}
    q, k, v = inputs(shape, dtype, device, packed, seed)

    def kernel(*x: Tensor) -> tuple[Tensor, Tensor]:
        return finite(*flash_attention_with_lse(*x, **named, options=options))

    def exact(*x: Tensor) -> tuple[Tensor, Tensor]:
        return finite(*attention_with_lse(*x, **named))

    def finite(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        assert lse.dtype == torch.promote_types(out.dtype, torch.float32)
        return out, lse.masked_fill(lse == -torch.inf, -1e3)  # a query that sees nothing has no gradient

    compare(kernel, exact, (q, k, v), tolerance=GRADIENT[dtype])


def check_layout(device: str, options: Mapping[str, Any] | None) -> None:
    """The result lies in memory as the queries do: merging heads is a view. Other strides are copied."""
    shape = Shape(2, 2, 1, 9, 9, 16)
    q, k, v = inputs(shape, torch.float32, device, None)
    out = flash_attention(q, k, v, options=options)
    assert out.transpose(1, 2).is_contiguous()
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)  # last dimension not contiguous
    assert turned.stride(-1) != 1
    torch.testing.assert_close(flash_attention(turned, k, v, options=options), out)
    leaf = q.detach().requires_grad_()
    (grad,) = torch.autograd.grad(flash_attention(leaf, k, v, options=options).sum(), leaf)  # an expanded gradient
    assert grad.isfinite().all()


def check_extremes(device: str, options: Mapping[str, Any] | None) -> None:
    """Scores far beyond what exp can take; nan stays in its row."""
    shape = Shape(1, 1, 1, 33, 33, 16)
    q, k, v = inputs(shape, torch.float32, device, None)
    out, lse = flash_attention_with_lse(300 * q, 300 * k, v, options=options)
    expected, logs = attention_with_lse(300 * q.double(), 300 * k.double(), v.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-2)  # fp32 scores of 1e5: 1e-2 in the exponent
    torch.testing.assert_close(lse.double(), logs, rtol=1e-6, atol=2e-2)
    q[0, 0, 7, 3] = torch.nan
    out, lse = flash_attention_with_lse(q, k, v, options=options)
    bad = torch.zeros(33, dtype=torch.bool)
    bad[7] = True
    assert torch.equal(out[0, 0].isnan().all(1).cpu(), bad)
    assert torch.equal(out[0, 0].isnan().any(1).cpu(), bad)
    assert torch.equal(lse[0, 0].isnan().cpu(), bad)


def check_same_bits(device: str, options: Mapping[str, Any] | None, dtype: torch.dtype = torch.float32) -> None:
    """Twice the same, gradients included."""
    shape = Shape(1, 2, 1, 33, 33, 16)
    runs = []
    for _ in range(2):
        leaves = [t.detach().requires_grad_() for t in inputs(shape, dtype, device, None)]
        out = flash_attention(*leaves, window=9, options=options)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def check_finite_differences(device: str, options: Mapping[str, Any] | None) -> None:
    """Gradients of the kernels against central differences of the kernels, along random directions."""
    shape = Shape(1, 2, 1, 5, 6, 8)
    leaves = [t.detach().requires_grad_() for t in inputs(shape, torch.float32, device, None, 7)]

    def value(*x: Tensor) -> Tensor:
        out, lse = flash_attention_with_lse(*x, options=options)
        weight = draw(*out.shape, seed=11, dtype=torch.float32, device=device)
        return ((out * weight).sum() + lse.square().sum()).double()

    grads = torch.autograd.grad(value(*leaves), leaves)
    for i in range(3):
        along = [draw(*t.shape, seed=20 + i, dtype=torch.float32, device=device) for t in leaves]
        with torch.no_grad():
            ahead, behind = (value(*(t + h * a for t, a in zip(leaves, along, strict=True))) for h in (1e-2, -1e-2))
        expected = (ahead - behind) / 2e-2
        found = sum((g * a).double().sum() for g, a in zip(grads, along, strict=True))
        assert abs(found - expected) <= 2e-3 * max(1.0, abs(expected)), (found, expected)


def cubins(width: int = 128, bytes: int = 2) -> None:
    """Causal, four query heads to a key head, as a block of a model calls it."""
    dtype = {2: torch.bfloat16, 4: torch.float32}[bytes]
    q = meta(2, 4096, 32, width, dtype=dtype).transpose(1, 2)
    k, v = (meta(2, 4096, 8, width, dtype=dtype).transpose(1, 2) for _ in range(2))
    backward(flash_attention(q, k, v))


TABLES = tuple(f"attention_{name}" for name in ("forward", "dots", "dkdv", "dq"))
CUBINS = {"attention": CubinCase(cubins, TABLES)}
