"""Layer normalisation.

    y = (x - mean(x)) / sqrt(var(x) + eps) * w + b        (biased variance, over the last dimension)

Source: Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450. The kernels are those of
:mod:`triloom_kernels.normalising`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension. x: ``[..., h]``; weight, bias: ``[h]``; 16-bit inputs are computed in fp32."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``(total, layer_norm(total))`` of ``total = residual + x``; all but weight and bias ``[..., h]``."""
    total = residual + x
    return total, layer_norm(total, weight, bias, eps)
