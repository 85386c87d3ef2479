"""AdamW on flat shards: unscale, clip, both averages, the master weights and their 16-bit copy in one pass.

    g = grad * grad_scale
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + ((1 - beta2) * g) * g
    p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^step) * m) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps)

Each operation is rounded once, in this order and without contraction, so that every device gives the same bits.
Sources: Loshchilov and Hutter, arXiv 1711.05101; bias corrections of Kingma and Ba, arXiv 1412.6980. With the averages
in 8 bits: Dettmers et al., arXiv 2110.02861; the second one is kept as its root. The kernels are in
:mod:`triloom_kernels.flat_adamw`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

BLOCK = 64
"""Elements that share the scale of an 8-bit average."""

Numbers = Sequence[float]
"""grad_scale, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr weight_decay, lr / (1 - beta1^step),
1 / sqrt(1 - beta2^step), eps: in double, rounded once to the dtype of param."""


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    numbers: Numbers,
    low: Tensor | None = None,
    *,
    sqrt: Callable[[Tensor], Tensor] = torch.sqrt,
) -> None:
    """One update in place, in torch operations; unchecked.

    param, exp_avg, exp_avg_sq: flat, of one dtype, fp32 or fp64; grad: the same dtype or narrower; low: 16-bit copy of
    the new parameters, or None; sqrt: a correctly rounded one where torch's is not.

    No addcmul, addcdiv, lerp or ``alpha``: they may fuse a multiplication with an addition on a GPU; and no division
    by a number, which there is a multiplication by its reciprocal.
    """
    grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps = numbers
    g = grad.reshape(param.shape).to(param.dtype) * grad_scale
    m, v = exp_avg.view_as(param), exp_avg_sq.view_as(param)
    m.mul_(beta1).add_(g * one_minus_beta1)
    v.mul_(beta2).add_((g * one_minus_beta2) * g)
    param.mul_(decay).sub_((m * rate).div_(sqrt(v).mul_(inv_sqrt_correction).add_(eps)))
    if low is not None:
        low.view_as(param).copy_(param)


@torch.no_grad()
def adamw8_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_max: Tensor,
    root: Tensor,
    root_max: Tensor,
    numbers: Numbers,
    tables: Tensor,
    low: Tensor | None = None,
    *,
    sqrt: Callable[[Tensor], Tensor] = torch.sqrt,
) -> None:
    """One update in place with averages in 8 bits, in torch operations; unchecked.

    exp_avg, root: uint8 codes of the first average and of the root of the second; exp_avg_max, root_max: the largest
    magnitude of each BLOCK elements, in param's dtype; the length is a multiple of BLOCK. tables: ``[4, 256]`` in
    param's dtype and on its device: the numbers of signed codes, the bounds between them, and the same unsigned.
    """
    grad_scale, beta1, one_minus_beta1, beta2, one_minus_beta2, decay, rate, inv_sqrt_correction, eps = numbers
    flat = param.view(-1)
    g = grad.reshape(-1).to(param.dtype) * grad_scale
    m = decode(exp_avg, exp_avg_max, tables[0]).mul_(beta1).add_(g * one_minus_beta1)
    r = decode(root, root_max, tables[2])
    r = sqrt((r * r).mul_(beta2).add_((g * one_minus_beta2) * g))
    flat.mul_(decay).sub_((m * rate).div_((r * inv_sqrt_correction).add_(eps)))
    for values, bounds, codes, largest in ((m, tables[1], exp_avg, exp_avg_max), (r, tables[3], root, root_max)):
        new, top = encode(values, bounds)
        codes.copy_(new.view_as(codes))
        largest.copy_(top.view_as(largest))
    if low is not None:
        low.view_as(param).copy_(param)


def encode(values: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, flat) and largest magnitudes of the blocks of ``values``, whose length BLOCK divides.

    bounds: the 255 between the numbers (what follows is not looked at), rising; a value on a bound goes down.
    """
    rows = values.reshape(-1, BLOCK)
    largest = rows.abs().amax(dim=1)
    divisor = torch.where(largest == 0, torch.ones_like(largest), largest)
    codes = torch.bucketize(rows / divisor[:, None], bounds[:255])
    return codes.to(torch.uint8).reshape(-1), largest


def decode(codes: Tensor, largest: Tensor, numbers: Tensor) -> Tensor:
    """The flat values that codes stand for, in the dtype of ``largest``. numbers: 256."""
    return (numbers[codes.long()].view(-1, BLOCK) * largest[:, None]).reshape(-1)
