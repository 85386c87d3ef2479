"""SwiGLU, GeGLU and GELU with and without a bias."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triloom_kernels import biased_gelu, gated

from . import common
from .common import CubinCase, backward, meta


class Activation(NamedTuple):
    function: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: int
    """2: with a bias."""
    fold: int
    """Columns of the input to one of the output."""


def _gate(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return formula


_tanh, _erf = partial(F.gelu, approximate="tanh"), F.gelu
ACTIVATIONS = {
    "swiglu": Activation(gated.swiglu, _gate(F.silu), 1, 2),
    "geglu_tanh": Activation(gated.geglu, _gate(_tanh), 1, 2),
    "geglu_erf": Activation(partial(gated.geglu, approximate="none"), _gate(_erf), 1, 2),
    "gelu_tanh": Activation(biased_gelu.gelu, _tanh, 1, 1),
    "gelu_erf": Activation(partial(biased_gelu.gelu, approximate="none"), _erf, 1, 1),
    "bias_gelu_tanh": Activation(biased_gelu.bias_gelu, lambda x, b: _tanh(x + b), 2, 1),
    "bias_gelu_erf": Activation(partial(biased_gelu.bias_gelu, approximate="none"), lambda x, b: _erf(x + b), 2, 1),
}


def inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """shape: of the result."""
    _, _, count, fold = ACTIVATIONS[name]
    x = common.draw(*shape[:-1], shape[-1] * fold, seed=seed, dtype=dtype, device=device, scale=2.0)
    return [x, *(common.draw(shape[-1], seed=seed + 1, dtype=dtype, device=device) for _ in range(count - 1))]


def check(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    op = ACTIVATIONS[name]
    common.compare(op.function, op.formula, inputs(name, shape, dtype, device, seed), seed=seed + 20)


def drawn(count: int, seed: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape of the result), each activation in turn; odd sizes."""
    rng = random.Random(seed)
    widths, leads = [1, 3, 17, 64, 127, 129, 520, 1100], [(1,), (3,), (17,), (2, 5), (1, 2, 3)]
    return [(list(ACTIVATIONS)[i % len(ACTIVATIONS)], (*rng.choice(leads), rng.choice(widths))) for i in range(count)]


def check_strides(name: str, device: str) -> None:
    """Rows apart, columns apart (copied), leading dimensions that do not fold, gradients expanded and transposed."""
    op = ACTIVATIONS[name]
    whole = common.draw(4, 6, 40, seed=1, dtype=torch.float32, device=device)
    bias = [common.draw(20, seed=2, dtype=torch.float32, device=device)[::2]] * (op.inputs - 1)
    for x in (whole[0, :, 3:13], whole[0, :, ::4], whole[:, 1:4, :10].transpose(0, 1)):
        for grads in (lambda g: g[..., :1].expand_as(g), lambda g: g.transpose(0, -1).contiguous().transpose(0, -1)):
            common.compare(op.function, op.formula, [x, *bias], grads=grads)


def check_extremes(name: str, device: str) -> None:
    """Far out the curves are 0 or the identity, and so are their slopes; nan stays alone."""
    op = ACTIVATIONS[name]
    x = torch.tensor([[0.0, -0.0, 1e-30, 90.0, -90.0, 1e4, -1e4, 3e9]], device=device)
    more = [torch.zeros(8 // op.fold, device=device)] * (op.inputs - 1)
    common.compare(op.function, op.formula, [x, *more])
    x = torch.ones(3, 8, device=device)
    x[1] = torch.nan
    made = op.function(x, *more)
    assert made[1].isnan().all()
    assert made[[0, 2]].isfinite().all()


def cubin(name: str) -> CubinCase:
    op, table = ACTIVATIONS[name], "gated" if ACTIVATIONS[name].fold == 2 else "gelu"

    def run(width: int = 4096) -> None:
        backward(op.function(meta(8192, width * op.fold), *(meta(width) for _ in range(op.inputs - 1))))

    return CubinCase(run, (table,))


CUBINS = {name: cubin(name) for name in ACTIVATIONS if name not in ("gelu_tanh", "gelu_erf")}
