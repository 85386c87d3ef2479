"""Adafactor: the second moment of a matrix kept as a row and a column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from .base import Hyper, Rule, Spec
from .rates import LrSchedule, inverse_sqrt

RELATIVE = inverse_sqrt(1e-2)
"""The relative step size of the paper."""


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Factored second moments, no first one (Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5).

    A rule on whole tensors. ``rows + columns`` numbers of state for a matrix (of the last two dimensions, for
    each of the others), all of them for a vector. The step is ``lr`` times the root mean square of the
    parameter (at least ``eps[1]``), and the update is clipped to the root mean square ``threshold``. Weight
    decay is decoupled.
    """

    lr: float | LrSchedule = RELATIVE
    beta2_decay: float = -0.8
    """``beta2 = 1 - t^beta2_decay`` at update t."""
    eps: tuple[float, float] = (1e-30, 1e-3)
    """Added to the squared gradient; smallest root mean square of a parameter."""
    threshold: float = 1.0

    reach: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta2_decay > 0 or not min(self.eps) > 0 or not self.threshold > 0:
            raise ConfigError(
                f"Adafactor needs beta2_decay <= 0, eps and threshold above 0, got {self.beta2_decay}, {self.eps}, "
                f"{self.threshold}"
            )

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        if len(shape) < 2:
            return {"exp_avg_sq": Spec(shape, dtype)}
        return {"rows": Spec(shape[:-1], dtype), "columns": Spec((*shape[:-2], shape[-1]), dtype)}

    @torch.no_grad()
    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        fresh = hyper.step**self.beta2_decay  # 1 - beta2
        g = grad.to(param.dtype) * hyper.grad_scale
        square = g * g + self.eps[0]
        if "rows" in states:
            rows, columns = states["rows"], states["columns"]
            rows.mul_(1 - fresh).add_(square.mean(dim=-1) * fresh)
            columns.mul_(1 - fresh).add_(square.mean(dim=-2) * fresh)
            moment = (rows / rows.mean(dim=-1, keepdim=True))[..., :, None] * columns[..., None, :]
        else:
            moment = states["exp_avg_sq"].mul_(1 - fresh).add_(square * fresh)
        update = g / moment.sqrt()
        size = hyper.lr * torch.clamp(_root_mean_square(param), min=self.eps[1])
        param.mul_(1 - hyper.lr * hyper.weight_decay)
        param.sub_(update * (size / torch.clamp(_root_mean_square(update) / self.threshold, min=1.0)))
        if low is not None:
            low.copy_(param)


def _root_mean_square(x: torch.Tensor) -> torch.Tensor:
    return (x * x).mean().sqrt()
