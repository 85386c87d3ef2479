"""RMS normalisation.

    rstd = 1 / sqrt(mean(x^2) + eps)        y = x * rstd * w

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4.
Gradients, with p = g * x (element-wise), over rows of width h:

    dw = sum_rows p * rstd
    dx = rstd * (g * w - x * rstd^2 * (p . w) / h)

The kernels are those of :mod:`triloom_kernels.normalising`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension.

    x: ``[..., h]``; weight: ``[h]``; returns ``[..., h]`` in x's dtype. 16-bit inputs are computed in
    fp32. Keeps x and one number per row for the backward.
    """
    out: Tensor = RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return out


def rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(total, rms_norm(total))`` of ``total = residual + x``; all but the weight ``[..., h]``."""
    total = residual + x
    return total, rms_norm(total, weight, eps)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        dx, dw = rms_norm_backward(grad, x, weight, rstd)
        return dx, dw, None


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``; rstd is ``[..., 1]`` in the computing dtype."""
    wide = x.float() if x.element_size() < 4 else x
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight).to(x.dtype), rstd


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """``(dx, dw)`` with one temporary of x's size; the row and column sums are matrix-vector products."""
    h = x.shape[-1]
    x2, g2, r = x.reshape(-1, h).to(rstd.dtype), grad.reshape(-1, h).to(rstd.dtype), rstd.reshape(-1, 1)
    w = weight.to(rstd.dtype)
    p = g2 * x2
    dots = torch.mv(p, w)
    dw = torch.mv(p.t(), r.view(-1))
    coef = (dots.unsqueeze(1) * (r * r * r)).div_(-h)
    dx = torch.mul(g2, w, out=p).mul_(r).addcmul_(x2, coef)
    return dx.view(x.shape).to(x.dtype), dw.to(weight.dtype)
