"""Learning-rate schedules: functions of the step. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError

LrSchedule = Callable[[int], float]
"""Learning rate of step t, counted from 0."""


def constant(lr: float, *, warmup: int = 0) -> LrSchedule:
    """Linear warm-up over ``warmup`` steps, then ``lr``."""
    _check(warmup, None)
    return lambda step: lr * _grown(step, warmup)


def warmup_cosine(peak: float, *, warmup: int, steps: int, floor: float = 0.0) -> LrSchedule:
    """Linear warm-up over ``warmup`` steps to ``peak``, then half a cosine down to ``floor`` at ``steps``."""
    _check(warmup, steps)

    def lr(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return lr


def wsd(peak: float, *, warmup: int, steps: int, cooldown: int, floor: float = 0.0) -> LrSchedule:
    """Warm-up, stable, decay (Hu et al., arXiv 2404.06395): ``peak`` until ``steps - cooldown``, then a straight line.

    It reaches ``floor`` at ``steps``. A run can be resumed from its stable part and cooled down later.
    """
    _check(warmup, steps)
    if cooldown < 0 or warmup + cooldown > steps:
        raise ConfigError(f"cooldown={cooldown} must lie between 0 and steps - warmup = {steps - warmup}")

    def lr(step: int) -> float:
        left = (steps - step) / cooldown if cooldown else float(step < steps)
        return floor + (peak - floor) * min(1.0, max(0.0, left)) if step >= warmup else peak * _grown(step, warmup)

    return lr


def inverse_sqrt(peak: float) -> LrSchedule:
    """``min(peak, 1 / sqrt(t))`` with t counted from 1: the relative step size of Adafactor (arXiv 1804.04235)."""
    return lambda step: min(peak, 1 / math.sqrt(step + 1))


def _grown(step: int, warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else 1.0


def _check(warmup: int, steps: int | None) -> None:
    if warmup < 0 or (steps is not None and (steps < 1 or warmup > steps)):
        raise ConfigError(f"warmup={warmup} must lie between 0 and steps={steps}")
