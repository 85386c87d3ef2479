"""GELU, alone and after a bias.

    tanh:  y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))        none:  y = x/2 * (1 + erf(x / sqrt(2)))

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2; tanh is the form of GPT-2.
The kernels are in :mod:`triloom_kernels.biased_gelu`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """Element-wise, any shape; the result has x's dtype. approximate: ``tanh`` or ``none``, as in torch."""
    return F.gelu(x, approximate=approximate)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """``gelu(x + bias)``; x: ``[..., f]``, bias: ``[f]``."""
    return F.gelu(x + bias, approximate=approximate)
