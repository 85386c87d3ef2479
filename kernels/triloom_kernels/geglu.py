"""GeGLU on the fused gate/up projection.

    y = gelu(gate) * up

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6. The kernels are those of
:mod:`triloom_kernels.gated`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor, approximate: str = "tanh") -> Tensor:
    """gate_up: ``[..., 2 f]``, gate first; returns ``[..., f]``. approximate: ``tanh`` or ``none`` (erf)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate=approximate) * up
