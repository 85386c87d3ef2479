"""What a rank holds for microbatches after each of its actions: the table that the executor keeps, foretold. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..actions import Action, Program, Subject
from ..passes import StateLayout

Held = tuple[str, int, int]
"""What, of which unit and microbatch. ``act``: the unit's output, made or with room made for it, until its user or
its SEND took it; ``grad``: the same of the output's gradient; ``saved``: what the backward needs; ``deferred``: what
is left for W."""


def held(program: Program, layout: StateLayout) -> tuple[tuple[frozenset[Held], ...], ...]:
    """For each coordinate, what is held after each of its actions, of a program that was accepted."""
    last = max(u for units in layout.units for u in units)
    training = any(a.op in ("B", "BW") for row in program.ranks for a in row)
    return tuple(tuple(_Table(layout, last, training).rows(row)) for row in program.ranks)


class _Table:
    """The table of one coordinate, with a handler for each operation that changes it."""

    def __init__(self, layout: StateLayout, last: int, training: bool) -> None:
        self._layout, self._last, self._training = layout, last, training
        self._held: set[Held] = set()
        self._computes: dict[str, Callable[[int, int], None]] = {
            "F": self._forward,
            "BW": self._backward,
            "B": self._deferring,
            "W": lambda unit, mb: self._held.remove(("deferred", unit, mb)),
        }

    def rows(self, row: tuple[Action, ...]) -> Iterator[frozenset[Held]]:
        for action in row:
            mb = action.microbatch or 0
            if action.op in self._computes:
                units = self._layout.units_of(action)
                for unit in units if action.op == "F" else reversed(units):
                    self._computes[action.op](unit, mb)
            elif action.op in ("SEND", "RECV"):
                change = self._held.remove if action.op == "SEND" else self._held.add
                change((action.subject.kind, boundary_unit(self._layout, action.subject), mb))
            yield frozenset(self._held)

    def _forward(self, unit: int, mb: int) -> None:
        if unit > 0:
            self._held.remove(("act", unit - 1, mb))
        if self._training:
            self._held.add(("saved", unit, mb))
        if unit < self._last:
            self._held.add(("act", unit, mb))
        elif self._training:
            self._held.add(("grad", unit, mb))

    def _backward(self, unit: int, mb: int) -> None:
        self._held -= {("grad", unit, mb), ("saved", unit, mb)}
        if unit > 0:
            self._held.add(("grad", unit - 1, mb))

    def _deferring(self, unit: int, mb: int) -> None:
        self._backward(unit, mb)
        self._held.add(("deferred", unit, mb))


def boundary_unit(layout: StateLayout, subject: Subject) -> int:
    """The unit whose output a boundary tensor is (``act``), or whose output's gradient (``grad``)."""
    units = layout.units[subject.index or 0]
    return units[-1] if subject.kind == "act" else units[0] - 1
