"""Muon: momentum whose singular values are made equal, for the matrices inside a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..errors import ConfigError
from .base import Hyper, Match, Rule, Spec, Treatment, matrices
from .elementwise import AdamW
from .rates import LrSchedule

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic ``a x + b x^3 + c x^5`` (Jordan et al., Muon, 2024): steep at 0, and it keeps (0, 1] within
about [0.7, 1.2] of 1, which is all that an update needs."""


def hidden_matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices and higher of the units in between: not of the loss, which holds the head, nor with ``embed`` in
    the name. For a model with other names, give a predicate of your own."""
    return matrices(name, shape) and not name.startswith("loss.") and "embed" not in name


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Momentum, orthogonalised by Newton-Schulz steps (Jordan et al., 2024; with weight decay and the factor
    ``0.2 sqrt(max(rows, columns))``, which gives updates the size of AdamW's: Liu et al., arXiv 2502.16982).

    A rule on whole tensors, for those that ``match``; the others go to ``rest``. Tensors of more than two
    dimensions are matrices of their first dimension against all others. In the dtype of the masters; on a CPU a
    step costs about ``steps * (4 m n^2 + 2 n^3)`` operations for m x n, n the smaller.
    """

    lr: float | LrSchedule = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    weight_decay: float = 0.1
    match_adamw: bool = True
    """Scale updates like AdamW's, so that its lr and weight decay can be kept. False: by
    ``sqrt(max(1, rows / columns))``, as first published, with an lr of about 0.02."""
    match: Match = hidden_matrices
    rest: Rule | None = None
    """None: AdamW with the same lr, weight decay, ``decay`` and groups."""

    reach: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1 or self.steps < 1:
            raise ConfigError(f"momentum must lie in [0, 1) and steps be at least 1: {self.momentum}, {self.steps}")

    def treatment(self, name: str, shape: tuple[int, ...]) -> Treatment:
        if len(shape) >= 2 and self.match(name, shape):
            return super().treatment(name, shape)
        rest = self.rest or AdamW(lr=self.lr, weight_decay=self.weight_decay, decay=self.decay, groups=self.groups)
        return rest.treatment(name, shape)

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        return {"momentum": Spec(shape, dtype)}

    @torch.no_grad()
    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        m = states["momentum"]
        g = grad.to(m.dtype) * (hyper.grad_scale * (1 - self.momentum))
        m.mul_(self.momentum).add_(g)
        direction = g + m * self.momentum if self.nesterov else m
        matrix = direction.reshape(param.shape[0], -1)
        rows, columns = matrix.shape
        size = 0.2 * math.sqrt(max(rows, columns)) if self.match_adamw else math.sqrt(max(1.0, rows / columns))
        update = orthogonal(matrix, self.steps).view(param.shape)
        param.mul_(1 - hyper.lr * hyper.weight_decay).sub_(update * (hyper.lr * size))
        if low is not None:
            low.copy_(param)


def muon_with_adamw(
    *,
    lr: float | LrSchedule,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
    nesterov: bool,
) -> Muon:
    """Muon whose rest is an AdamW with the same rates and decay."""
    rest = AdamW(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
    return Muon(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, rest=rest)


def orthogonal(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """``U V^T`` of the singular value decomposition ``U S V^T``, nearly: singular values within about 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.t()
    x = x / ((x * x).sum().sqrt() + 1e-7)
    for _ in range(steps):
        gram = x @ x.t()
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x if wide else x.t()).contiguous()
