"""Optimizers of ``torch.optim`` as rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..errors import ConfigError
from .base import BLOCK, Group, Hyper, Match, Rule, Spec, everything
from .rates import LrSchedule

REFUSED: Mapping[str, str] = {
    "LBFGS": "it evaluates the loss several times a step and couples all parameters",
    "Adafactor": "it looks at rows and columns of whole tensors; use triloom.optim.Adafactor",
    "Muon": "it orthogonalises whole matrices; use triloom.optim.Muon",
    "SparseAdam": "it needs sparse gradients",
}
"""Optimizers known not to be element-wise, and why."""


@dataclass(frozen=True, init=False)
class TorchOptimizer(Rule):
    """An element-wise optimizer of ``torch.optim`` (or of its kind) on the flat shards.

    ``TorchOptimizer(torch.optim.NAdam, lr=1e-3, betas=(0.9, 0.99))``; other options than lr, weight_decay, decay and
    groups go to the optimizer. Its states live in the flat layout as others do, and each update hands them to a
    fresh optimizer with one parameter, so that nothing is kept aside. Costs about 0.2 ms more than the update
    for each piece. Weight decay, if not given the optimizer's own default, applies to every parameter, as in torch,
    unless ``decay`` says otherwise.

    Raises ConfigError for an optimizer that is not element-wise: those of REFUSED, and what a trial shows.
    """

    factory: Callable[..., torch.optim.Optimizer] = field(default=torch.optim.SGD)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        factory: Callable[..., torch.optim.Optimizer],
        *,
        lr: float | LrSchedule,
        weight_decay: float | None = None,
        decay: Match = everything,
        groups: tuple[Group, ...] = (),
        **options: Any,
    ) -> None:
        known = inspect.signature(factory).parameters.get("weight_decay")
        if weight_decay is None:
            weight_decay = 0.0 if known is None else float(known.default)
        values = {"factory": factory, "options": dict(options), "lr": lr, "decay": decay, "groups": groups}
        for name, value in {**values, "weight_decay": weight_decay}.items():
            object.__setattr__(self, name, value)
        self.__post_init__()
        _check(self)

    @property
    def name(self) -> str:
        return getattr(self.factory, "__name__", str(self.factory))

    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        """What a first update of a few elements leaves: tensors of their shape, and single numbers, one a piece."""
        param = torch.zeros(BLOCK, dtype=dtype)
        kept = self._apply(param, torch.ones_like(param), {}, _FIRST)
        out: dict[str, Spec] = {}
        for key, value in kept.items():
            if not isinstance(value, torch.Tensor) or value.shape not in (param.shape, ()):
                what = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
                raise ConfigError(f"{self.name} keeps {key!r} as {what}; only tensors, one number an element, or one "
                                  "number in all, can be kept in the flat layout")  # fmt: skip
            out[key] = Spec(shape if value.shape else (), value.dtype)
        return out

    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        scaled = grad.to(param.dtype) * hyper.grad_scale
        given = {} if hyper.step == 1 else dict(states)
        for key, value in self._apply(param, scaled, given, hyper).items():
            if value.data_ptr() != states[key].data_ptr():
                states[key].copy_(value)
        if low is not None:
            low.copy_(param)

    def _apply(
        self, param: torch.Tensor, grad: torch.Tensor, states: dict[str, torch.Tensor], hyper: Hyper
    ) -> dict[str, Any]:
        """One step on ``param`` in place; the states after it. ``states`` empty: the first step."""
        p = torch.nn.Parameter(param)
        p.grad = grad
        options = dict(self.options)
        if hyper.weight_decay or "weight_decay" in inspect.signature(self.factory).parameters:
            options["weight_decay"] = hyper.weight_decay
        optimizer = self.factory([p], lr=hyper.lr, **options)
        if states:
            optimizer.state[p] = states
        optimizer.step()
        return {k: v for k, v in optimizer.state[p].items() if v is not None}


_FIRST = Hyper(lr=1e-2, step=1, weight_decay=0.0, grad_scale=1.0)


def _check(rule: TorchOptimizer) -> None:
    """Refuse what is not element-wise: a vector must be updated as its parts are."""
    if rule.name in REFUSED:
        raise ConfigError(f"{rule.name} is not element-wise: {REFUSED[rule.name]}")
    whole = torch.linspace(-1, 2, 2 * BLOCK, dtype=torch.float64)
    parts = [whole[:BLOCK].clone(), whole[BLOCK:].clone()]
    for tensor in (whole, *parts):
        states: dict[str, torch.Tensor] = {}
        for step in (1, 2, 3):
            grad = tensor.sin() * step
            states = rule._apply(tensor, grad, states, replace(_FIRST, step=step, weight_decay=rule.weight_decay))
    if not torch.allclose(whole, torch.cat(parts), rtol=1e-12, atol=1e-12):
        raise ConfigError(
            f"{rule.name} is not element-wise: it updates the halves of a vector otherwise than the vector, so the "
            "result would depend on the sharding. Write it as a Rule with reach=None, which gets whole tensors"
        )
