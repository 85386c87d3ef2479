"""GELU in the tanh form.

    y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))

Source: Hendrycks and Gimpel, "Gaussian Error Linear Units", arXiv 1606.08415, section 2; the form of GPT-2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """Element-wise, any shape; the result has x's dtype."""
    return F.gelu(x, approximate="tanh")
