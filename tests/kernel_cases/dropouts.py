"""Dropout with counted draws, alone and between a bias and a residual: the bits of the runtime's own code."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from triloom import philox
from triloom_kernels import counted_dropout
from triloom_kernels.dropout import indices, words

from . import common
from .common import CubinCase, backward, meta

KEYS = (0, 1, 1 << 31, (1 << 64) - 1, philox.key(7, "test", 3), philox.key(8, "test", 3))
BASES = (0, 4, 3, (1 << 32) - 2, (1 << 34) - 4, (1 << 62) + 1)


def drawn(count: int, seed: int) -> list[tuple[tuple[int, ...], tuple[int, ...], int, int, float]]:
    """(shape, index strides, base, key, p): whole tensors, parts of a sequence, parts of the heads; odd sizes."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        b, s, h = rng.choice([1, 2, 3]), rng.choice([1, 3, 5]), rng.choice([1, 4, 17, 64, 127, 132])
        shape, strides = [
            ((b, s, h), (s * h, h, 1)),
            ((b, s, h), (s * h * 2, h, 1)),  # half of a sequence
            ((s, b, h), (h, s * h * 2, 1)),  # sequence first
            ((b, 2, s, s), (6 * s * s, s * s, s, 1)),  # two of six heads
            ((b * s, h), (1, b * s)),  # columns apart
        ][i % 5]
        out.append((shape, strides, rng.choice(BASES), rng.choice(KEYS), rng.choice([0.1, 0.5, 0.9])))
    return out


def expected(x: Tensor, p: float, key: int, base: int, strides: Sequence[int]) -> Tensor:
    """The runtime's native code, on the CPU."""
    return philox.dropout(x.cpu(), p, key, base, strides).to(x.device)


def check_bits(shape: Any, strides: Any, base: int, key: int, p: float, dtype: torch.dtype, device: str) -> None:
    """dropout alone, forward and backward, bit for bit; with bias and residual in fp32 too."""
    x = common.draw(*shape, seed=1, dtype=dtype, device=device).requires_grad_()
    grad = common.draw(*shape, seed=2, dtype=dtype, device=device)
    how = p, key, base, strides
    with common.poisoned():
        y = counted_dropout.dropout(x, *how)
        (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, expected(x.detach(), *how))
    assert torch.equal(dx, expected(grad, *how))
    if dtype == torch.float32:
        bias, residual = (common.draw(*size, seed=3, dtype=dtype, device=device) for size in (shape[-1:], shape))
        with common.poisoned():
            y = counted_dropout.bias_dropout_residual(x, bias, residual, *how)
            without = counted_dropout.bias_dropout_residual(x, None, residual, *how)
        assert torch.equal(y, residual + expected(x.detach() + bias, *how))
        assert torch.equal(without, residual + expected(x.detach(), *how))


def check_fused(shape: Any, strides: Any, base: int, key: int, p: float, dtype: torch.dtype, device: str) -> None:
    """Results and all gradients of the fused form against fp64."""
    keep = (words(indices(torch.empty(shape), base, strides), key) >= int(p * 2**32)).to(device)

    def plain(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + torch.where(keep, (x + bias) / (1 - p), 0.0)

    def fused(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return counted_dropout.bias_dropout_residual(x, bias, residual, p, key, base, strides)

    sizes = (shape, shape[-1:], shape)
    tensors = [common.draw(*size, seed=4 + i, dtype=dtype, device=device) for i, size in enumerate(sizes)]
    common.compare(fused, plain, tensors)


def check_cuts(device: str) -> None:
    """Any part of a tensor that names its place drops what the whole drops."""
    x = common.draw(4, 6, 20, seed=5, dtype=torch.float32, device=device)
    whole = counted_dropout.dropout(x, 0.4, KEYS[4], 8, (120, 20, 1))
    for part, base in (((slice(1, 3),), 120), ((slice(None), slice(2, 5)), 40), ((..., slice(7, 16)), 7)):
        assert torch.equal(counted_dropout.dropout(x[part], 0.4, KEYS[4], 8 + base, (120, 20, 1)), whole[part])


def check_share(device: str) -> None:
    """The share that falls is p within five standard deviations."""
    p, n = 0.3, 1 << 14
    y = counted_dropout.dropout(torch.ones(n, device=device), p, KEYS[5], 0, (1,))
    assert abs((y == 0).double().mean().item() - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert (y[y != 0] == torch.tensor(1 / (1 - p)).item()).all()


def fused(step: int) -> CubinCase:
    """step: of the index over columns; 1 shares an evaluation between neighbours."""

    def run(width: int = 4096) -> None:
        x, bias, residual = meta(4, 2048, width), meta(width), meta(4, 2048, width)
        how = 0.1, KEYS[4], 0, (2048 * width * step, width * step, step)
        backward(counted_dropout.bias_dropout_residual(x, bias, residual, *how))

    return CubinCase(run, ("dropout",))


CUBINS = {"bias_dropout_residual": fused(1), "bias_dropout_residual_columns_apart": fused(2)}
