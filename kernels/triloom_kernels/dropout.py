"""Dropout with counter-based draws, alone and between a bias and a residual addition.

    y = residual + drop(x + bias),  drop(v) = 0 where word < p * 2^32, else v / (1 - p)

The word of an element follows from a key and the element's index in the whole computation
(:mod:`triloom_kernels.draws`): any cut of the tensor over any mesh drops the same elements, and nothing but key and
indices is kept for the backward. The kernels are in :mod:`triloom_kernels.counted_dropout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .draws import indices, pieces, words


def dropout(x: Tensor, p: float, key: int, base: int, strides: Sequence[int]) -> Tensor:
    """Zero elements with probability p and scale the others by 1 / (1 - p).

    x: floating-point, any strides; key: below 2^64; the element at position i has index ``base + sum(i_k strides[k])``,
    below 2^63. Differentiable any number of times. Raises ValueError unless 0 <= p < 1.
    """
    check(x, p, key, base, strides)
    if p == 0.0:
        return x
    out: Tensor = _Dropout.apply(x, int(p * 2**32), 1.0 / (1.0 - p), key, base, tuple(strides))  # type: ignore[no-untyped-call]
    return out


def bias_dropout_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, key: int, base: int, strides: Sequence[int]
) -> Tensor:
    """``residual + dropout(x + bias)``; residual: of x's shape; bias: of its last dimension."""
    return residual + dropout(x if bias is None else x + bias, p, key, base, strides)


def check(x: Tensor, p: float, key: int, base: int, strides: Sequence[int]) -> None:
    """Raise ValueError for what cannot be drawn."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p!r}")
    if len(strides) != x.dim():
        raise ValueError(f"index strides {tuple(strides)} must have one entry per dimension of shape {tuple(x.shape)}")
    if not 0 <= key < 1 << 64 or base < 0 or min(strides, default=0) < 0:
        raise ValueError(f"key {key} must be a 64-bit number, base {base} and strides {tuple(strides)} not negative")


def drop(x: Tensor, threshold: int, scale: float, key: int, base: int, strides: Sequence[int]) -> Tensor:
    """Zero where the word is below the threshold, else ``x * scale`` computed in fp32 (fp64 for fp64)."""
    out = torch.empty_like(x)
    for (source, target), at in pieces((x, out), base, strides):
        target.copy_(drop_values(source, indices(source, at, strides), key, threshold, scale))
    return out


def drop_values(x: Tensor, index: Tensor, key: int, threshold: int, scale: float) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(words(index, key) < threshold, torch.zeros_like(x), (wide * scale).to(x.dtype))


class _Dropout(torch.autograd.Function):
    """Linear in x, so that its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        ctx.how = how
        return drop(x, *how)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (_Dropout.apply(grads[0], *ctx.how), *(None for _ in ctx.how))  # type: ignore[no-untyped-call]
