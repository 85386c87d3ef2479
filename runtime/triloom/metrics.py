"""What a step reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """What a step reports; the same on every rank."""

    step: int
    loss: float
    """Sum of the losses over the global batch divided by their weight."""
    weight: float
    """Global loss weight (tokens that counted, or samples)."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    lr: float
    scale: float = 1.0
    """What the loss was multiplied with for the backward; the norm is that of the true gradient."""
    skipped: bool = False
    """The gradient was not finite: no parameter, state or step count changed, on any rank."""
    note: str = ""
    """Where the gradient was not finite first."""
    notices: int = 0
    """Bits that any rank had for all (``totals.notices``), joined."""
