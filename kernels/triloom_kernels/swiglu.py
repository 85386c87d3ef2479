"""SwiGLU on the fused gate/up projection.

    y = silu(gate) * up,  silu(z) = z * sigmoid(z)

Source: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, equation 6. Gradients:

    dgate = g * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))
    dup   = g * silu(gate)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up: ``[..., 2 f]``, gate first; returns ``[..., f]``. Keeps only its input for the backward."""
    out: Tensor = SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return out


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return swiglu_backward(grad, gate_up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of the fused input, written into one buffer: no concatenation."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate_up)
    dgate, dup = out.chunk(2, dim=-1)
    torch.mul(F.silu(gate), grad, out=dup)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=dgate)
    return out
