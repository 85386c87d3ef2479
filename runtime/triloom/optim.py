"""Optimizers and learning-rate schedules as plain values and pure rules.

An optimizer is a rule over flat pieces of parameters: it names its states and updates one piece in
place. It never sees the mesh, the shards or the modules, so every placement gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from . import native
from .errors import ConfigError

LrSchedule = Callable[[int], float]
"""Learning rate of step t, counted from 0."""


def constant(lr: float) -> LrSchedule:
    return lambda step: lr


def warmup_cosine(peak: float, *, warmup: int, steps: int, floor: float = 0.0) -> LrSchedule:
    """Linear warm-up over ``warmup`` steps to ``peak``, then half a cosine down to ``floor`` at ``steps``."""
    if warmup < 0 or steps < 1 or warmup > steps:
        raise ConfigError(f"warmup={warmup} must lie between 0 and steps={steps}")

    def lr(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return lr


def matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Decay weight matrices only: norms, biases and other vectors are left alone."""
    return len(shape) >= 2


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one update of one piece needs besides the tensors."""

    lr: float
    step: int
    """Count of updates, this one included (1 at the first)."""
    decay: bool
    grad_scale: float
    """Factor on the gradient: clipping and unscaling in one."""
    pool: native.Pool | None = None
    """Threads for the update of a piece on the host; None for the calling thread alone."""


class Optimizer(Protocol):
    """A rule. ``states`` names the flat fp32 (fp64 for fp64 models) tensors it keeps, all starting at zero."""

    @property
    def states(self) -> tuple[str, ...]: ...

    @property
    def lr(self) -> float | LrSchedule: ...

    def decays(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether weight decay applies to a parameter (global name and shape)."""
        ...

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        """Update ``param`` (master precision) and the states in place; write ``low``, its 16-bit copy, if given."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    Only ``+ - * / sqrt`` in a fixed order, so every instruction set and the GPU give the same bits.
    """

    lr: float | LrSchedule = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay: Callable[[str, tuple[int, ...]], bool] = matrices

    def __post_init__(self) -> None:
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), got {self.betas}")
        if self.eps <= 0 or self.weight_decay < 0:
            raise ConfigError(f"eps must be above 0 and weight_decay at least 0, got {self.eps}, {self.weight_decay}")
        if not callable(self.lr) and not self.lr >= 0:
            raise ConfigError(f"lr must not be negative, got {self.lr}")

    @property
    def states(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def decays(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.decay(name, shape)

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        native.adamw_(
            param,
            grad,
            states["exp_avg"],
            states["exp_avg_sq"],
            lr=hyper.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay if hyper.decay else 0.0,
            step=hyper.step,
            grad_scale=hyper.grad_scale,
            low=low,
            pool=hyper.pool,
        )
