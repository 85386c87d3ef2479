"""Normalisation layers. Their parameters are whole on every rank of tp.

With sequence parallelism a rank sees its part of the sequence only, so that its gradients are terms
of a sum over tp (``partial_grad``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..scope import Scope
from ..shards import ShardSpec
from .weights import Init, parameter


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension; weight starts at 1."""

    def __init__(self, hidden: int, *, scope: Scope, name: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        spec = ShardSpec((hidden,), partial_grad=scope.sequence_parallel and scope.tp.size > 1)
        self.shards = {"weight": spec}
        self.weight = parameter(scope, f"{name}.weight", spec, Init(value=1.0))
        self._normalise = scope.kernels.pick("rms_norm", scope.device)
        self._add_normalise = scope.kernels.pick("rms_norm_residual", scope.device)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` to the same shape and dtype."""
        out: Tensor = self._normalise(x, self.weight, self.eps)
        return out

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(residual + x, the norm of that)``."""
        out: tuple[Tensor, Tensor] = self._add_normalise(x, residual, self.weight, self.eps)
        return out


class LayerNorm(nn.Module):
    """``(x - mean) / std * weight + bias`` over the last dimension; weight starts at 1, bias at 0."""

    def __init__(self, hidden: int, *, scope: Scope, name: str, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        spec = ShardSpec((hidden,), partial_grad=scope.sequence_parallel and scope.tp.size > 1)
        self.shards = {"weight": spec} | ({"bias": spec} if bias else {})
        self.weight = parameter(scope, f"{name}.weight", spec, Init(value=1.0))
        self.bias = parameter(scope, f"{name}.bias", spec, Init()) if bias else None
        self._normalise = scope.kernels.pick("layer_norm", scope.device)
        self._add_normalise = scope.kernels.pick("layer_norm_residual", scope.device)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` to the same shape and dtype."""
        out: Tensor = self._normalise(x, self.weight, self.bias, self.eps)
        return out

    def after_adding(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(residual + x, the norm of that)``."""
        out: tuple[Tensor, Tensor] = self._add_normalise(x, residual, self.weight, self.bias, self.eps)
        return out


def reduce_partial_grads(module: nn.Module, scope: Scope) -> None:
    """Sum the ``.grad`` of parameters with partial gradients over tp, in place: for layers used without an engine."""
    for layer in module.modules():
        shards: dict[str, ShardSpec] = getattr(layer, "shards", {})
        for name, spec in shards.items():
            grad: torch.Tensor | None = getattr(layer, name).grad
            if spec.partial_grad and grad is not None:
                scope.tp.all_reduce(grad).wait()
