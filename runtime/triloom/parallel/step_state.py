"""What a step is made of on one rank: its units, what lives until its end, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..actions import Action
from .cut import Boundary, Pass
from .recompute import Keeper, Kept
from .splitting import Splitter
from .weight_grads import UnitGrads
from .wire import TensorMeta


@dataclass(frozen=True, slots=True)
class UnitRun:
    """A unit on this rank."""

    index: int
    module: torch.nn.Module
    params: list[torch.nn.Parameter]
    grads: UnitGrads
    is_loss: bool = False
    keeper: Keeper = field(default_factory=Keeper)
    splitter: Splitter = field(default_factory=Splitter)


@dataclass(slots=True)
class StepState:
    """Everything that lives for one step."""

    inputs: Sequence[Boundary]
    targets: Sequence[Any]
    signatures: Sequence[Any]
    """Shapes of each microbatch: the key of remembered boundary shapes."""
    samples: Sequence[int]
    """Global index of each microbatch's first sample."""
    step: int
    lr: float = 0.0
    training: bool = True
    weights: list[float] = field(default_factory=list)
    total_weight: float = 0.0
    loss_scale: float = 0.0
    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    loss: float = float("nan")
    grad_norm: float = float("nan")
    grad_scale: float = 1.0
    """What the optimizer multiplies the gradient with: clipping over the loss scale."""
    scale: float = 1.0
    """The loss scale of this step."""
    skipped: bool = False
    """The gradient was not finite: nothing is updated."""
    note: str = ""
    diverged: str = ""
    """Why the training cannot go on; empty if it can."""
    notices: int = 0
    """Bits that any rank had for all of them, joined."""
    passes: dict[tuple[int, int], Pass] = field(default_factory=dict)
    """(unit, microbatch) -> what its backward needs."""
    outs: dict[tuple[int, int], Boundary] = field(default_factory=dict)
    """(unit, microbatch) -> output of the unit, until its consumer or its SEND took it."""
    kept: dict[tuple[int, int], Kept] = field(default_factory=dict)
    """(unit, microbatch) -> input of a unit that is recomputed."""
    recomputed: frozenset[int] = frozenset()
    """Units whose activations are recomputed."""
    carriers: dict[tuple[int, int], list[TensorMeta]] = field(default_factory=dict)
    """(stage, microbatch) -> shapes of the gradients its backward will be given."""
    grads: dict[tuple[int, int], list[torch.Tensor]] = field(default_factory=dict)
    """(unit, microbatch) -> gradients of that unit's outputs."""
    unknown: frozenset[Any] = frozenset()
    """Signatures whose boundary shapes were unknown when the step began."""
    apart: frozenset[int] = frozenset()
    """Units that have a W of their own."""


Handler = Callable[[Action, StepState], None]


class Recorder(Protocol):
    """Is told when each action of a list ran; :class:`triloom.spans.Spans` is one."""

    def begin(self, actions: int) -> None:
        """A list of so many actions starts."""

    def action(self, action: Action, begin_ns: int, end_ns: int) -> None:
        """The next action of the list is over."""

    def wait(self, begin_ns: int, end_ns: int) -> None:
        """The action under way waited for a tensor from another rank."""
