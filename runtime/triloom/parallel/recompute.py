"""Recomputation: a forward that keeps only its input, and the second forward that makes the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import TriloomError
from . import cut
from .cut import Boundary, Pass


@dataclass(frozen=True, slots=True)
class Kept:
    """The input of a unit, and the versions its tensors had."""

    x: Boundary
    versions: tuple[int, ...]
    flags: tuple[bool, ...]
    """Which outputs were announced to carry a gradient."""


class Keeper:
    """Runs the two forwards of one unit. Remembers whether the unit changes its input in place."""

    def __init__(self) -> None:
        self._changes_input: bool | None = None

    def forward(self, unit: nn.Module, x: Boundary, has_params: bool, *extra: Any) -> tuple[Boundary, Kept]:
        """The forward without a graph. A unit that changes its input gets a copy, found out at its first run.

        Without a graph nobody knows which outputs will carry a gradient: every floating-point output does,
        if an input or a parameter has one.
        """
        given = _copy(x) if self._changes_input in (None, True) else x
        before = _versions(given)
        with torch.no_grad():
            out = cut.boundary(unit(given.tree(), *extra))
        if self._changes_input is None:
            self._changes_input = _versions(given) != before
        differentiable = has_params or any(x.needs_grad)
        flags = tuple(differentiable and isinstance(y, torch.Tensor) and y.is_floating_point() for y in out.leaves)
        return Boundary(out.leaves, out.spec, flags), Kept(x, _versions(x), flags)

    def again(self, unit: nn.Module, kept: Kept, *extra: Any) -> Pass:
        """The forward with a graph, on the kept input."""
        if _versions(kept.x) != kept.versions:
            raise TriloomError(
                "the input of a recomputed unit was changed in place after its forward: change a copy, or do not "
                "recompute the unit"
            )
        with _statistics_once(unit):
            out, record = cut.forward(unit, _copy(kept.x) if self._changes_input else kept.x, *extra)
        outputs = iter(record.outputs)
        made = [next(outputs) if now else None for now in out.needs_grad]
        return Pass(record.inputs, [y for y, said in zip(made, kept.flags, strict=True) if said])


def _copy(x: Boundary) -> Boundary:
    return Boundary([v.clone() if isinstance(v, torch.Tensor) else v for v in x.leaves], x.spec, x.needs_grad)


def _versions(x: Boundary) -> tuple[int, ...]:
    return tuple(t._version for t in x.tensors())


@contextmanager
def _statistics_once(unit: nn.Module) -> Iterator[None]:
    """Batch norms normalise as in the first forward but do not move their running statistics again."""
    norms = [m for m in unit.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True
