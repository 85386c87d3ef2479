"""The updates: checked calls of the native loops, and the same arithmetic in torch for other devices.

As in :mod:`triloom.native`: each operation is rounded once and in the stated order, in the dtype of
``param``, so that both have the same bits. param: fp32 or fp64. grad: its dtype or narrower. low: optional bf16
or fp16 copy of the new parameters. States have the dtype of param unless said otherwise. Everything is
contiguous, of one length and on one device (ConfigError), and, on the CPU, apart in memory (NativeError).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from triloom_kernels.adamw import adamw8_ as eager_adamw8_
from triloom_kernels.table import default

from .. import _C, native
from ..errors import ConfigError
from ..native import DTYPE_CODES, HALVES, AdamWNumbers, Pool, written
from ..native import _check as check
from .base import BLOCK
from .blocks import SIGNED, UNSIGNED


class SgdNumbers(NamedTuple):
    grad_scale: float
    weight_decay: float
    momentum: float
    lr: float


class LionNumbers(NamedTuple):
    grad_scale: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    decay: float
    """1 - lr * weight_decay."""
    lr: float


def _check_piece(param: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None) -> None:
    check("param", param, (torch.float32, torch.float64))
    narrower = HALVES if param.dtype == torch.float32 else (torch.float32, *HALVES)
    check("grad", grad, (param.dtype, *narrower), param)
    if low is not None:
        check("low", low, HALVES, param)


def _addresses(param: torch.Tensor, grad: torch.Tensor, low: torch.Tensor | None) -> tuple[int, ...]:
    """param, grad, low; their dtypes; the length."""
    code = DTYPE_CODES[param.dtype]
    return (
        param.data_ptr(),
        grad.data_ptr(),
        0 if low is None else low.data_ptr(),
        code,
        DTYPE_CODES[grad.dtype],
        code if low is None else DTYPE_CODES[low.dtype],
        param.numel(),
    )


def _scaled(param: torch.Tensor, grad: torch.Tensor, factor: float) -> torch.Tensor:
    return grad.reshape(param.shape).to(param.dtype) * factor


def _copy(low: torch.Tensor | None, param: torch.Tensor) -> None:
    if low is not None:
        low.view_as(param).copy_(param)


def sgd_(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor | None,
    numbers: SgdNumbers,
    *,
    nesterov: bool = False,
    low: torch.Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """One step of gradient descent, as ``torch.optim.SGD`` without dampening, in place:

        g = grad * grad_scale + weight_decay * p
        m = momentum * m + g
        p = p - lr * (g + momentum * m if nesterov, m, or without a momentum tensor g)
    """  # fmt: skip
    _check_piece(param, grad, low)
    if momentum is not None:
        check("momentum", momentum, (param.dtype,), param)
    if param.device.type != "cpu":
        sgd_reference(param, grad, momentum, numbers, nesterov=nesterov, low=low)
        return
    kept = 0 if momentum is None else momentum.data_ptr()
    _C.sgd(_addresses(param, grad, low), kept, nesterov, numbers, pool)
    written(*(t for t in (param, momentum, low) if t is not None))


@torch.no_grad()
def sgd_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor | None,
    numbers: SgdNumbers,
    *,
    nesterov: bool = False,
    low: torch.Tensor | None = None,
) -> None:
    """:func:`sgd_` in torch operations, for any device; unchecked."""
    k = numbers
    g = _scaled(param, grad, k.grad_scale).add_(param * k.weight_decay)
    direction = g
    if momentum is not None:
        m = momentum.view_as(param)
        m.mul_(k.momentum).add_(g)
        direction = g + m * k.momentum if nesterov else m
    param.sub_(direction * k.lr)
    _copy(low, param)


def lion_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    numbers: LionNumbers,
    *,
    low: torch.Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """One step of Lion (arXiv 2302.06675), in place; sign(0) is 0:

        g = grad * grad_scale
        p = p * decay - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g
    """  # fmt: skip
    _check_piece(param, grad, low)
    check("exp_avg", exp_avg, (param.dtype,), param)
    if param.device.type != "cpu":
        lion_reference(param, grad, exp_avg, numbers, low=low)
        return
    _C.lion(_addresses(param, grad, low), exp_avg.data_ptr(), numbers, pool)
    written(*(t for t in (param, exp_avg, low) if t is not None))


@torch.no_grad()
def lion_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    numbers: LionNumbers,
    *,
    low: torch.Tensor | None = None,
) -> None:
    """:func:`lion_` in torch operations, for any device; unchecked."""
    k = numbers
    g = _scaled(param, grad, k.grad_scale)
    m = exp_avg.view_as(param)
    sign = (m * k.beta1 + g * k.one_minus_beta1).sign_()
    param.mul_(k.decay).sub_(sign * k.lr)
    m.mul_(k.beta2).add_(g * k.one_minus_beta2)
    _copy(low, param)


def adamw8_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_max: torch.Tensor,
    root: torch.Tensor,
    root_max: torch.Tensor,
    *,
    numbers: AdamWNumbers,
    low: torch.Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """One AdamW update with averages in 8 bits, in place; the length of param is a multiple of BLOCK.

    exp_avg, root: uint8, codes of the first moment and of the root of the second. exp_avg_max, root_max: one
    number a block. With m and r decoded, and coded again at the end:

        g = grad * grad_scale
        m = beta1 * m + (1 - beta1) * g
        r = sqrt(beta2 * (r * r) + ((1 - beta2) * g) * g)
        p = p * decay - (rate * m) / (r * inv_sqrt_correction + eps)
    """
    _check_piece(param, grad, low)
    if param.numel() % BLOCK:
        raise ConfigError(f"param has {param.numel()} elements, which is not a multiple of {BLOCK}; pad it with zeros")
    blocks = param.view(-1)[::BLOCK]
    for name, codes, largest in (("exp_avg", exp_avg, exp_avg_max), ("root", root, root_max)):
        check(name, codes, (torch.uint8,), param)
        check(f"{name}_max", largest, (param.dtype,), blocks)
    states = (exp_avg, exp_avg_max, root, root_max)
    tables = _tables(param.dtype, param.device)
    if param.device.type != "cpu":
        _KERNELS.pick("adamw8_", param.device)(param, grad, *states, numbers, tables, low)
        return
    _C.adamw8(_addresses(param, grad, low), [t.data_ptr() for t in states], tables.data_ptr(), numbers, pool)
    written(param, *states, *(() if low is None else (low,)))


def adamw8_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_max: torch.Tensor,
    root: torch.Tensor,
    root_max: torch.Tensor,
    numbers: AdamWNumbers,
    low: torch.Tensor | None = None,
) -> None:
    """:func:`adamw8_` in torch operations, for any device; unchecked."""
    states, tables = (exp_avg, exp_avg_max, root, root_max), _tables(param.dtype, param.device)
    eager_adamw8_(param, grad, *states, numbers, tables, low, sqrt=native.sqrt)


@cache
def _tables(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Signed numbers and bounds, unsigned numbers and bounds: ``[4, 256]``."""
    pad = torch.zeros(1, dtype=torch.float64)
    rows = [row for table in (SIGNED, UNSIGNED) for row in (table.numbers, torch.cat([table.bounds, pad]))]
    return torch.stack(rows).to(device, dtype)


_KERNELS = default()
"""For devices other than the CPU."""
