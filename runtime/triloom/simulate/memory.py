"""Peak memory in the two sizes of the cost model: from F to the backward, from B to W. Pure."""

from __future__ import annotations

from ..actions import Action, Program, stage_of
from ..passes import StateLayout
from .costs import Costs, per_stage


def peaks(program: Program, costs: Costs, layout: StateLayout | None = None) -> tuple[float, ...]:
    """Per coordinate, the most that its microbatches hold at once.

    It depends on the order of a rank's actions alone. A stage's memory is taken when its F begins (less
    of it, if an R brings the rest), shrinks or grows to the deferred size when B ends, and is free when
    W, or BW, ends. Unit actions count as the stage's at its first unit. Boundary tensors are not
    counted: ``verify`` bounds them in bytes.
    """
    held, deferred = costs.memory(program.stages)
    stage_of_unit = {u: s for s, units in enumerate(layout.units) for u in units} if layout else {}
    firsts = {units[0] for units in layout.units} if layout else set()
    backward = any(a.op in ("B", "BW") for row in program.ranks for a in row)
    recomputed = {_stage(a, stage_of_unit) for row in program.ranks for a in row if a.op == "R"}
    all_kept = per_stage("kept", costs.kept, program.stages)
    kept = [all_kept[s] if s in recomputed else h for s, h in enumerate(held)]
    change = {
        "F": kept if backward else [0.0] * len(held),
        "R": [h - k for h, k in zip(held, kept, strict=True)],
        "BW": [-h for h in held],
        "B": [d - h for d, h in zip(deferred, held, strict=True)],
        "W": [-d for d in deferred],
    }
    out = []
    for row in program.ranks:
        level = top = 0.0
        for a in row:
            if a.op not in change:
                continue
            if a.subject.kind == "unit" and a.subject.index not in firsts:
                continue
            level += change[a.op][_stage(a, stage_of_unit)]
            top = max(top, level)
        out.append(top)
    return tuple(out)


def _stage(action: Action, stage_of_unit: dict[int, int]) -> int:
    return stage_of_unit[stage_of(action)] if action.subject.kind == "unit" else stage_of(action)
