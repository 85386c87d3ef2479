"""Cutting a stage's compute actions into one action per unit, so that state actions fit in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..actions import COMPUTE, Action, Program, Subject, replace_ranks, stage_of
from .layout import StateLayout

WEIGHT_GRADIENT = ("BW", "W")
"""The actions that add to weight gradients."""
REVERSED = ("BW", "B", "W", "R")
"""Cut into units last unit first. R too: a recomputed unit is then used at once."""


def last_weight_gradients(row: Sequence[Action]) -> set[int]:
    """Where each stage adds its last weight gradients."""
    return set({stage_of(a): i for i, a in enumerate(row) if a.op in WEIGHT_GRADIENT}.values())


def lower(row: Sequence[Action], layout: StateLayout, wanted: Callable[[int, Action], bool]) -> list[Action]:
    """Cut the wanted stage actions into units.

    An R that comes before the backward of the same stage and microbatch with no compute in between is
    interleaved with it unit by unit, so that one recomputed unit is alive at a time.
    """
    out: list[Action] = []
    held: Action | None = None
    for i, a in enumerate(row):
        if a.op not in COMPUTE:
            out.append(a)
            continue
        joined = held is not None and a.op in ("B", "BW") and (a.subject, a.microbatch) == held[1:3]
        if held is not None and not joined:
            out += _units(held, layout)
        cut = wanted(i, a)
        if a.op == "R" and cut:
            held = a
            continue
        steps = _units(a, layout) if cut or joined else [a]
        if held is not None and joined:
            steps = [step for one in steps for step in (one._replace(op="R"), one)]
        held = None
        out += steps
    return out + ([] if held is None else _units(held, layout))


def whole_stages(program: Program, layout: StateLayout) -> Program:
    """Unit actions put together again: the action of the stage where that of its last unit in the row was."""
    stage_of = {u: s for s, units in enumerate(layout.units) for u in units}

    def row(actions: Sequence[Action]) -> Iterator[Action]:
        left: dict[Action, int] = {}
        for a in actions:
            if a.op in COMPUTE and a.subject.kind == "unit":
                stage = stage_of[a.subject.index or 0]
                a = a._replace(subject=Subject("stage", stage))
                left[a] = left.get(a, len(layout.units[stage])) - 1
            if not left.get(a):
                yield a

    return replace_ranks(program, map(row, program.ranks))


def _units(action: Action, layout: StateLayout) -> list[Action]:
    units = layout.units_of(action)
    order = reversed(units) if action.op in REVERSED else units
    return [action._replace(subject=Subject("unit", u)) for u in order]
