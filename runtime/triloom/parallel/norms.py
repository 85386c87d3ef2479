"""Global gradient norms, in any parts and any order the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .. import native
from ..errors import ConfigError

Pair = tuple[float, float]
"""High and low part of a number in about twice the precision of a double."""


@dataclass(frozen=True)
class Norm:
    """A norm from parts: ``part`` of one flat gradient, ``join`` of pairs to a pair, ``finish`` of the last one."""

    part: Callable[[torch.Tensor, native.Pool | None], Pair]
    join: Callable[[Iterable[Pair]], Pair]
    finish: Callable[[Pair], float]


def _sum(pairs: Iterable[Pair]) -> Pair:
    return native.wide_sum(torch.tensor([x for pair in pairs for x in pair], dtype=torch.float64))


def _max(pairs: Iterable[Pair]) -> Pair:
    highest = torch.tensor([0.0, *(high for high, _ in pairs)], dtype=torch.float64).max()  # NaN if any is
    return float(highest), 0.0


def _absolute(grad: torch.Tensor, pool: native.Pool | None) -> Pair:
    return native.wide_sum(grad.double().abs())


def _largest(grad: torch.Tensor, pool: native.Pool | None) -> Pair:
    return (float(grad.abs().max()), 0.0) if grad.numel() else (0.0, 0.0)


NORMS = {
    2.0: Norm(lambda grad, pool: native.sum_squares_wide(grad, pool=pool), _sum, lambda p: math.sqrt(p[0])),
    1.0: Norm(_absolute, _sum, lambda p: p[0]),
    math.inf: Norm(_largest, _max, lambda p: p[0]),
}
"""By the order of the norm."""


@dataclass(frozen=True)
class Clip:
    """Scale the gradient down to the norm ``largest`` (None: only measure it). order: 1, 2 or inf."""

    largest: float | None
    order: float = 2.0

    def __post_init__(self) -> None:
        if self.largest is not None and not self.largest > 0:
            raise ConfigError(f"clip must be above 0 (or None for no clipping), got {self.largest!r}")
        if self.order not in NORMS:
            raise ConfigError(f"the clip norm's order must be one of {', '.join(map(str, NORMS))}, got {self.order!r}")

    @property
    def norm(self) -> Norm:
        return NORMS[self.order]

    def factor(self, norm: float) -> float:
        return 1.0 if self.largest is None else min(1.0, self.largest / (norm + 1e-6))
