"""Where weight gradients go: one accumulator per parameter and use, written by closures.

A weight gradient always comes from one closure, run inside the backward (``BW``) or later (``W``),
and is added in microbatch order: the same operations on the same operands, so the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import TriloomError
from ..scope import GradWriter


@dataclass(slots=True)
class Accumulator:
    """One use of one parameter. ``fresh`` until the step's first write, which overwrites."""

    name: str
    out: torch.Tensor
    fresh: bool = True
    written: bool = False
    """Whether a gradient came in this step."""

    def write(self, writer: GradWriter) -> None:
        writer(self.out, not self.fresh)
        self.fresh = False
        self.written = True

    def settle(self) -> torch.Tensor:
        """The sum; zeros if nothing was written in this step."""
        if self.fresh:
            self.out.zero_()
            self.fresh = False
        return self.out


@dataclass(slots=True)
class UnitGrads:
    """The weight-gradient sink of one unit (implements ``scope.WeightGrads``)."""

    uses: dict[int, Accumulator]
    """By ``id(parameter)``: parameters are unhashable by value and live as long as the unit."""
    deferring: int | None = None
    """Microbatch whose closures are kept for its W, or None to run them at once."""
    pending: dict[int, list[tuple[Accumulator, GradWriter]]] = field(default_factory=dict)

    @property
    def immediate(self) -> bool:
        return self.deferring is None

    def add(self, param: torch.nn.Parameter, write: GradWriter) -> None:
        use = self.uses.get(id(param))
        if use is None:
            raise TriloomError(
                f"a weight gradient of shape {tuple(param.shape)} arrived for a parameter that this unit "
                "does not own; hand triloom the parameter itself, not a copy or a view of it"
            )
        if self.deferring is None:
            use.write(write)
        else:
            self.pending.setdefault(self.deferring, []).append((use, write))

    def flush(self, microbatch: int) -> None:
        """W: run what the backward of this microbatch left."""
        left = self.pending.pop(microbatch, None)
        if left:
            with torch.no_grad():
                for use, write in left:
                    use.write(write)
