"""The pass that gathers sharded parameters before their use and frees them after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ..actions import COMPUTE, Action, Subject
from .layout import StateLayout

NEEDS_PARAMS = ("F", "B", "BW", "R")
"""W multiplies activations and gradients: it needs no weight."""


def add_residency(row: Sequence[Action], coord: int, layout: StateLayout, *, prefetch: int, keep: bool) -> list[Action]:
    """UNSHARD each bucket ``prefetch`` computes before the first of them that needs it, RESHARD it after the
    last; a bucket that is needed again within ``prefetch`` computes stays (with ``keep``: until its last use).

    The order of use is known, so nothing is guessed and no hook is needed.
    """
    computes = [i for i, a in enumerate(row) if a.op in COMPUTE]
    uses: dict[int, list[int]] = defaultdict(list)
    for slot, i in enumerate(computes):
        if row[i].op in NEEDS_PARAMS:
            for b in layout.touched(coord, row[i]):
                if not b.stays:
                    uses[b.index].append(slot)
    gather: Mapping[int, list[int]] = defaultdict(list)
    free: Mapping[int, list[int]] = defaultdict(list)
    for bucket, slots in uses.items():
        for first, last in _intervals(slots, len(computes) if keep else prefetch):
            gather[max(0, first - prefetch)].append(bucket)
            free[last].append(bucket)
    out: list[Action] = []
    slot = 0
    for a in row:
        if a.op not in COMPUTE:
            out.append(a)
            continue
        out += [Action("UNSHARD", Subject("params", b)) for b in gather[slot]]
        out.append(a)
        out += [Action("RESHARD", Subject("params", b)) for b in free[slot]]
        slot += 1
    return out


def _intervals(slots: Sequence[int], gap: int) -> list[tuple[int, int]]:
    """Runs of uses at most ``gap`` (and never less than one) apart, as (first, last)."""
    out: list[tuple[int, int]] = []
    for s in slots:
        if out and s - out[-1][1] <= max(1, gap):
            out[-1] = (out[-1][0], s)
        else:
            out.append((s, s))
    return out
