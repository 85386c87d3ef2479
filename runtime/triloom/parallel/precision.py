"""In which dtypes parameters and the optimizer's states are kept, and in which an update is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..optim.base import BLOCK, Rule, Spec
from ..placement import Placement

ARITHMETIC = {torch.float64: torch.float64}
"""Dtype of updates and of masters, and of gradients unless the placement says otherwise, by parameter dtype; fp32
where not listed."""

COMPENSATION = "compensation"
"""State that ``rounding = "kahan"`` adds: what each parameter lacks of the value before it was rounded."""


@dataclass(frozen=True)
class Precision:
    """Of one bucket.

    Without masters an update widens what is kept, computes as usual, and rounds what comes out. To the nearest it
    would be lost wherever it is below half of a bf16 step, 1/512 of the parameter, as most are: so it is rounded by
    chance (``stochastic``), or what was rounded off is kept in a second bf16 and added again (``kahan``: Zamirai et
    al., "Revisiting BFloat16 Training", arXiv 2010.06192). States in bf16 are always rounded by chance: to the
    nearest, an average with beta = 0.999 would not move any more.
    """

    params: torch.dtype
    """Of the parameters."""
    work: torch.dtype
    """Of masters and arithmetic."""
    states: torch.dtype
    """Of those states that a rule wants in ``work``."""
    rounding: str = "master"

    @property
    def master(self) -> bool:
        """Whether there is a copy of the parameters in ``work``."""
        return self.rounding == "master" and self.params != self.work

    @property
    def direct(self) -> bool:
        """Whether a rule can update what is kept as it is."""
        return self.states == self.work and (self.rounding == "master" or self.params == self.work)

    @property
    def compensated(self) -> bool:
        return self.rounding == "kahan" and self.params != self.work

    def specs(self, rule: Rule, shape: tuple[int, ...]) -> Mapping[str, Spec]:
        """What is kept for a piece of a parameter."""
        out = {}
        for name, spec in rule.states(shape, self.work).items():
            out[name] = Spec(spec.shape, self.states if self.narrowed(spec) else spec.dtype)
        if self.compensated:
            out[COMPENSATION] = Spec(shape, self.params)
        return out

    def narrowed(self, spec: Spec) -> bool:
        """Whether a state of a rule is kept in ``states``: not integers, and not single numbers."""
        return spec.dtype == self.work and len(spec.shape) > 0


def precision(placement: Placement, params: torch.dtype, rule: Rule) -> Precision:
    """Of parameters of a dtype. Raises ConfigError for what makes no sense."""
    work = ARITHMETIC.get(params, torch.float32)
    wanted = placement.optimizer.dtype
    states = work if wanted is None else getattr(torch, wanted)
    if states not in (work, torch.bfloat16):
        raise ConfigError(
            f"optimizer.dtype = {wanted!r}: states are kept in the dtype of the update, {_name(work)} for parameters "
            f"in {_name(params)}, or in bfloat16; leave it out or take one of these"
        )
    if states != work and rule.reach == BLOCK:
        raise ConfigError(
            f"optimizer.dtype = {wanted!r} with {type(rule).__name__}, whose states are in 8 bits already: leave it out"
        )
    if states != work and work != torch.float32:
        raise ConfigError(
            f"optimizer.dtype = {wanted!r} for parameters in {_name(params)}: only fp32 arithmetic is rounded to it"
        )
    if placement.rounding != "master" and params == torch.float16:
        raise ConfigError(
            f"rounding = {placement.rounding!r} is for bfloat16 parameters; float16 has not the range to be without "
            "masters: take rounding = 'master', or bfloat16"
        )
    return Precision(params, work, states, placement.rounding)


def model_dtype(given: torch.dtype | None, placement: Placement) -> torch.dtype:
    """Dtype of a model's own layers. Raises ConfigError if both are given and differ."""
    wanted = placement.params.dtype
    if wanted is None:
        return given or torch.float32
    if given not in (None, getattr(torch, wanted)):
        raise ConfigError(
            f"dtype = {given} and params.dtype = {wanted!r} of the placement differ: leave one of them out"
        )
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def check_rounding(placement: Placement, dtypes: set[torch.dtype]) -> None:
    """Raise ConfigError if the placement rounds parameters of a model that has none to round. dtypes: of a rank's."""
    if placement.rounding != "master" and dtypes and torch.bfloat16 not in dtypes:
        raise ConfigError(
            f"rounding = {placement.rounding!r} is for bfloat16 parameters, and this model's are in "
            f"{', '.join(sorted(map(_name, dtypes)))}: build it in bfloat16 (dtype=torch.bfloat16), or leave it out"
        )
    wanted = placement.params.dtype
    others = sorted(_name(d) for d in dtypes if wanted is not None and _name(d) != wanted)
    if others:
        raise ConfigError(
            f"params.dtype = {wanted!r}, but the model has parameters in {', '.join(others)}: build them in {wanted} "
            "(functions of a Scope are given it as scope.dtype), or leave params.dtype out"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
