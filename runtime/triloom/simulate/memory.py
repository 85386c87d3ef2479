"""Peak memory in the two sizes of the cost model: from F to the backward, from B to W. Pure."""

from __future__ import annotations

from ..actions import Program, stage_of
from ..passes import StateLayout
from .costs import Costs


def peaks(program: Program, costs: Costs, layout: StateLayout | None = None) -> tuple[float, ...]:
    """Per coordinate, the most that its microbatches hold at once.

    It depends on the order of a rank's actions alone. A stage's memory is taken when its F begins,
    shrinks (or grows) to the deferred size when B ends, and is free when W, or BW, ends; unit actions
    count when the last unit of the stage is done. Boundary tensors are not counted: ``verify`` bounds
    them in bytes.
    """
    held, deferred = costs.memory(program.stages)
    stage_of_unit = {u: s for s, units in enumerate(layout.units) for u in units} if layout else {}
    firsts = {units[0]: s for s, units in enumerate(layout.units)} if layout else {}
    backward = any(a.op in ("B", "BW") for row in program.ranks for a in row)
    change = {
        "F": held if backward else [0.0] * len(held),
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
            if a.subject.kind == "unit":
                if a.subject.index not in firsts:
                    continue
                stage = stage_of_unit[a.subject.index]
            else:
                stage = stage_of(a)
            level += change[a.op][stage]
            top = max(top, level)
        out.append(top)
    return tuple(out)
