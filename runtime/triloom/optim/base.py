"""What an optimizer is: rules over pieces of parameters, and which parameter gets which.

A rule names its states and updates one piece in place. It never sees the mesh, the shards or the
modules, so every placement gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch

from triloom_kernels import adamw

from .. import native
from ..errors import ConfigError
from .rates import LrSchedule

Match = Callable[[str, tuple[int, ...]], bool]
"""Predicate on a parameter's global name (``unit.parameter``) and global shape."""

BLOCK = adamw.BLOCK
"""Elements of a block of a block-wise rule. Shards and parameters start at multiples of it."""


def matrices(name: str, shape: tuple[int, ...]) -> bool:
    """Matrices and higher: norms, biases and other vectors are left out."""
    return len(shape) >= 2


def everything(name: str, shape: tuple[int, ...]) -> bool:
    """Every parameter."""
    return True


class Spec(NamedTuple):
    """One tensor that a rule keeps for a piece; it starts at zero."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """What one update of one piece needs besides the tensors."""

    lr: float
    step: int
    """Count of updates, this one included (1 at the first)."""
    weight_decay: float
    grad_scale: float
    """Factor on the gradient: clipping and unscaling in one."""
    pool: native.Pool | None = None
    """Threads for the update of a piece on the host; None for the calling thread alone."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are treated otherwise than the rest; the first group that matches counts."""

    match: Match
    lr_scale: float = 1.0
    """Factor on the rule's learning rate."""
    weight_decay: float | None = None
    """In place of the rule's (and of its ``decay`` predicate); None: those."""

    def __post_init__(self) -> None:
        if not self.lr_scale >= 0 or not (self.weight_decay is None or self.weight_decay >= 0):
            raise ConfigError(
                f"a parameter group needs lr_scale and weight_decay of at least 0, got {self.lr_scale} and "
                f"{self.weight_decay}"
            )


@dataclass(frozen=True)
class Treatment:
    """How one parameter is updated. Neighbours with equal treatments are updated in one call."""

    rule: Rule
    lr_scale: float
    weight_decay: float

    def rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        lr = self.rule.lr
        return self.lr_scale * (lr(step) if callable(lr) else lr)


class Optimizer(Protocol):
    """What the engine needs: the learning rate it reports, and the treatment of each parameter."""

    @property
    def lr(self) -> float | LrSchedule: ...

    def treatment(self, name: str, shape: tuple[int, ...]) -> Treatment:
        """Of the parameter of that global name and shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule, which is an optimizer that treats every parameter by itself.

    Subclasses are frozen dataclasses with ``states`` and ``update``; see the example in the package.
    """

    lr: float | LrSchedule = 1e-3
    weight_decay: float = 0.0
    decay: Match = matrices
    """Parameters that ``weight_decay`` applies to."""
    groups: tuple[Group, ...] = ()

    reach: ClassVar[int | None] = 1
    """How many neighbouring elements an update looks at: 1 for an element-wise rule, whose pieces are flat
    and may span several parameters; BLOCK for a block-wise one, the same with lengths and starts that are
    multiples of BLOCK; None for a rule on whole tensors, whose pieces are parameters in their own shape."""

    def __post_init__(self) -> None:
        if not callable(self.lr) and not self.lr >= 0:
            raise ConfigError(f"lr must not be negative, got {self.lr}")
        if not self.weight_decay >= 0:
            raise ConfigError(f"weight_decay must not be negative, got {self.weight_decay}")

    @abstractmethod
    def states(self, shape: tuple[int, ...], dtype: torch.dtype) -> Mapping[str, Spec]:
        """What the rule keeps for a piece; pure, and called before any tensor exists.

        shape: ``(n,)``, or with ``reach`` None the parameter's. dtype: fp32, fp64 for fp64 models. A flat piece
        has one element of a state for each element, or for each block of BLOCK.
        """

    @abstractmethod
    def update(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        states: Mapping[str, torch.Tensor],
        hyper: Hyper,
        low: torch.Tensor | None,
    ) -> None:
        """Update ``param`` (master precision) and the states in place; write ``low``, its 16-bit copy, if given.

        All contiguous; param, grad and low have the shape that ``states`` was asked for.
        """

    def treatment(self, name: str, shape: tuple[int, ...]) -> Treatment:
        weight_decay = self.weight_decay if self.decay(name, shape) else 0.0
        group = next((g for g in self.groups if g.match(name, shape)), None)
        if group is None:
            return Treatment(self, 1.0, weight_decay)
        return Treatment(self, group.lr_scale, weight_decay if group.weight_decay is None else group.weight_decay)


def check_betas(betas: tuple[float, float], eps: float = 1.0) -> None:
    """Raise ConfigError unless averages can be formed with these."""
    if not all(0 <= b < 1 for b in betas):
        raise ConfigError(f"betas must lie in [0, 1), got {betas}")
    if not eps > 0:
        raise ConfigError(f"eps must be above 0, got {eps}")
