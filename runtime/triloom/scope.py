"""What a unit's layers may know while they run, and where their weight gradients go.

One Scope belongs to one rank of one engine and is handed to the layers when they are built; there
is no current-anything. The executor moves ``step``, ``microbatch``, ``sample0`` and ``unit`` before
each forward and sets ``grads``; layers used without an engine keep ``grads=None``, and autograd
accumulates into ``.grad`` as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from triloom_kernels.table import Kernels

from .groups.base import Group
from .groups.solo import Solo
from .operations import operations

GradWriter = Callable[[torch.Tensor, bool], None]
"""``write(out, accumulate)``: put a weight gradient into ``out`` (same shape as the parameter, the
accumulation dtype), overwriting it or adding to it. Must not depend on when it is called."""


class WeightGrads(Protocol):
    """Takes the closures that compute weight gradients; runs them now or at the unit's W."""

    @property
    def immediate(self) -> bool:
        """Whether ``add`` runs the closure before it returns, so that communication for it pays off now."""
        ...

    def add(self, param: torch.nn.Parameter, write: GradWriter) -> None: ...


@dataclass
class Scope:
    """Context of the layers of one rank. All indices are global, so that draws are mesh-independent."""

    tp: Group = field(default_factory=Solo)
    """Tensor-parallel group."""
    sequence_parallel: bool = False
    """Activations between tensor-parallel regions are split along the sequence over tp."""
    seed: int = 0
    step: int = 0
    microbatch: int = 0
    sample0: int = 0
    """Global index, within the step's batch, of the microbatch's first sample."""
    unit: int = 0
    grads: WeightGrads | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    kernels: Kernels = field(default_factory=operations)
    """What computes an operation on a device. Layers pick theirs when they are built."""
    selective: bool = False
    """Layers recompute what is large to keep and cheap to compute: the inside of attention (arXiv 2205.05198)."""
