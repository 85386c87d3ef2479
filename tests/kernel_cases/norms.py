"""RMSNorm and LayerNorm, alone and after a residual addition."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triloom_kernels import normalising

from . import common
from .common import CubinCase, backward, meta

EPS = 1e-3


class Norm(NamedTuple):
    function: Callable[..., Any]
    centred: bool
    residual: bool


NORMS = {
    "rms_norm": Norm(normalising.rms_norm, False, False),
    "rms_norm_residual": Norm(normalising.rms_norm_residual, False, True),
    "layer_norm": Norm(normalising.layer_norm, True, False),
    "layer_norm_residual": Norm(normalising.layer_norm_residual, True, True),
}


def reference(norm: Norm, dtype: torch.dtype) -> Callable[..., Any]:
    """The formula in fp64; the residual sum is rounded to dtype first, as it is stored."""

    def plain(x: Tensor, *rest: Tensor) -> Any:
        total = _rounded(x + rest[0], dtype) if norm.residual else x
        weight, *bias = rest[1:] if norm.residual else rest
        v = total - total.mean(-1, keepdim=True) if norm.centred else total
        y = v / (v.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
        y = y + bias[0] if bias else y
        return (total, y) if norm.residual else y

    return plain


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x + (x.to(dtype).double() - x).detach()


def function(norm: Norm, biased: bool) -> Callable[..., Any]:
    """The kernels with eps and, for LayerNorm, a bias of None where there is none."""
    if norm.centred and not biased:
        return lambda *tensors: norm.function(*tensors, None, EPS)
    return lambda *tensors: norm.function(*tensors, EPS)


def inputs(
    norm: Norm, shape: tuple[int, ...], dtype: torch.dtype, device: str, biased: bool, seed: int
) -> list[Tensor]:
    x = [common.draw(*shape, seed=seed + i, dtype=dtype, device=device) for i in range(1 + norm.residual)]
    return x + [common.draw(shape[-1], seed=seed + 5 + i, dtype=dtype, device=device) for i in range(1 + biased)]


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, biased: bool, seed: int = 0) -> None:
    norm = NORMS[name]
    tensors = inputs(norm, shape, dtype, device, biased, seed)
    # The gradient of few columns is a small difference of large terms: all of one column's but eps / x^2 cancels.
    lost = {1: 2e4, 3: 300.0}.get(shape[-1], 1.0)
    tolerance = max(common.TOLERANCE[dtype], lost * common.TOLERANCE[common.computing(dtype)])
    common.compare(function(norm, biased), reference(norm, dtype), tensors, seed=seed + 50, tolerance=tolerance)


def drawn(count: int, seed: int, *, wide: bool = False) -> list[tuple[str, tuple[int, ...], bool]]:
    """(name, shape, biased), each norm in turn; odd sizes."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        name = list(NORMS)[i % len(NORMS)]
        width = rng.choice([1, 3, 17, 64, 127, 129, 300, 1100] + ([4097, 8000, 16385] if wide else []))
        lead = rng.choice([(1,), (3,), (17,), (2, 5), (1, 2, 3)])
        out.append((name, (*lead, width), NORMS[name].centred and rng.random() < 0.5))
    return out


def check_strides(name: str, device: str) -> None:
    """Rows apart, columns apart (copied), leading dimensions that do not fold, gradients expanded."""
    norm = NORMS[name]
    whole = common.draw(4, 6, 40, seed=1, dtype=torch.float32, device=device)
    weight = common.draw(20, seed=2, dtype=torch.float32, device=device)[::2]
    for x in (whole[0, :, 3:13], whole[0, :, ::4], whole[:, 1:4, :10].transpose(0, 1), whole[1, :, :10]):
        tensors = [x, x.flip(0), weight] if norm.residual else [x, weight]
        for grads in (lambda g: g[..., :1].expand_as(g), lambda g: g.transpose(0, -1).contiguous().transpose(0, -1)):
            common.compare(function(norm, False), reference(norm, torch.float32), tensors, grads=grads)


def check_extremes(name: str, device: str) -> None:
    """Zeros, large numbers, and a row with nan that stays alone."""
    norm = NORMS[name]
    for scale in (0.0, 1e15, 1e-15):
        tensors = inputs(norm, (5, 33), torch.float32, device, False, 3)
        tensors = [t * scale for t in tensors[:-1]] + tensors[-1:]
        common.compare(function(norm, False), reference(norm, torch.float32), tensors, tolerance=2e-5)
    tensors = inputs(norm, (4, 20), torch.float32, device, False, 4)
    tensors[0][1, 7] = torch.nan
    made = function(norm, False)(*tensors)
    y = made[1] if norm.residual else made
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


def check_same_bits(name: str, device: str) -> None:
    norm = NORMS[name]
    tensors = [t.requires_grad_() for t in inputs(norm, (40, 96), torch.float16, device, norm.centred, 5)]

    def once() -> list[Tensor]:
        made = function(norm, norm.centred)(*tensors)
        outputs = made if isinstance(made, tuple) else (made,)
        return [*outputs, *torch.autograd.grad(outputs, tensors, [torch.ones_like(t) for t in outputs])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def cubin(name: str) -> CubinCase:
    norm = NORMS[name]

    def run(width: int = 4096) -> None:
        sizes = [(8192, width)] * (1 + norm.residual) + [(width,)] * (1 + norm.centred)
        made = function(norm, norm.centred)(*(meta(*size) for size in sizes))
        backward(*(made if norm.residual else (made,)))

    return CubinCase(run, ("norm_forward", "norm_backward", "sum_rows"))


CUBINS = {name: cubin(name) for name in NORMS}
