"""Element-wise and block-wise rules: what they keep and which kernel applies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import native
from ..errors import ConfigError
from . import kernels
from .base import BLOCK, Hyper, Match, Rule, Spec, check_betas, everything
from .rates import LrSchedule


@dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
    """Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101).

    Only ``+ - * / sqrt`` in a fixed order, so every instruction set and the GPU give the same bits.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas, self.eps)

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        return {"exp_avg": Spec(shape, dtype), "exp_avg_sq": Spec(shape, dtype)}

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
            weight_decay=hyper.weight_decay,
            step=hyper.step,
            grad_scale=hyper.grad_scale,
            low=low,
            pool=hyper.pool,
        )


@dataclass(frozen=True, kw_only=True)
class AdamW8bit(Rule):
    """AdamW whose two averages are kept in 8 bits, quantised in blocks (Dettmers et al., arXiv 2110.02861).

    2.125 bytes of state a parameter with fp32 masters, where AdamW keeps 8. A code says which of 256 numbers
    times the largest magnitude of its block a value is nearest to; the numbers are :mod:`.blocks`. Two
    departures from the paper: blocks of 64, so that no shard and no parameter cuts one, and the second moment is
    kept as its root, which doubles the decades that its codes span, and never rounded down to zero (a division by
    next to nothing). The update itself is AdamW's, with the averages as they are before they are rounded.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    reach: ClassVar[int | None] = BLOCK

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas, self.eps)

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        (n,) = shape
        codes, largest = Spec((n,), torch.uint8), Spec((n // BLOCK,), dtype)
        return {"exp_avg": codes, "exp_avg_max": largest, "exp_avg_root": codes, "exp_avg_root_max": largest}

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        kernels.adamw8_(
            param,
            grad,
            states["exp_avg"],
            states["exp_avg_max"],
            states["exp_avg_root"],
            states["exp_avg_root_max"],
            numbers=native.adamw_numbers(
                lr=hyper.lr,
                betas=self.betas,
                eps=self.eps,
                weight_decay=hyper.weight_decay,
                step=hyper.step,
                grad_scale=hyper.grad_scale,
            ),
            low=low,
            pool=hyper.pool,
        )


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Stochastic gradient descent with momentum, plain or Nesterov's, as ``torch.optim.SGD`` without dampening.

    Weight decay is added to the gradient, of every parameter unless ``decay`` says otherwise.
    """

    lr: float | LrSchedule = 1e-2
    momentum: float = 0.9
    nesterov: bool = False
    decay: Match = everything

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must lie in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov=True needs a momentum above 0")

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        return {"momentum": Spec(shape, dtype)} if self.momentum else {}

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        numbers = kernels.SgdNumbers(hyper.grad_scale, hyper.weight_decay, self.momentum, hyper.lr)
        kernels.sgd_(param, grad, states.get("momentum"), numbers, nesterov=self.nesterov, low=low, pool=hyper.pool)


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Sign of an interpolated momentum (Chen et al., arXiv 2302.06675), with decoupled weight decay.

    Half of AdamW's state; the paper advises a third to a tenth of its rate and as much more decay.
    """

    lr: float | LrSchedule = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_betas(self.betas)

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        return {"exp_avg": Spec(shape, dtype)}

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        (b1, b2), decay = self.betas, 1 - hyper.lr * hyper.weight_decay
        numbers = kernels.LionNumbers(hyper.grad_scale, b1, 1 - b1, b2, 1 - b2, decay, hyper.lr)
        kernels.lion_(param, grad, states["exp_avg"], numbers, low=low, pool=hyper.pool)
