"""Footprints: which collectives an action issues, in which groups. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..actions import Action
from ..passes import StateLayout

Collective = tuple[str, str, int]
"""Name of the group, operation, bytes (0: not stated; must be equal over the members of a group)."""

Footprint = Callable[[int, Action], Sequence[Collective]]
"""``footprint(coordinate, action)``: the collectives it issues, in order."""

Groups = Mapping[str, Sequence[tuple[int, ...]]]
"""The pipeline coordinates that are members of each group: disjoint tuples per name. A group inside
a coordinate (tensor or data parallel) is one member."""


def inside(coordinates: int) -> list[tuple[int, ...]]:
    """Members of a group that each pipeline coordinate has for itself."""
    return [(c,) for c in range(coordinates)]


def state_groups(layout: StateLayout | None, coordinates: int) -> dict[str, list[tuple[int, ...]]]:
    """``dp`` inside each coordinate, ``norm`` over all of them, ``tie0``, ``tie1``, ... over those that share one."""
    ties = {} if layout is None else layout.tied_coordinates()
    groups = {"dp": inside(coordinates), "norm": [tuple(range(coordinates))]}
    return groups | {f"tie{t}": [coords] for t, coords in ties.items()}


def state_footprint(layout: StateLayout | None) -> Footprint:
    """What the state actions issue; computes issue nothing (no tensor parallelism)."""

    def ties(coord: int, action: Action) -> Sequence[Collective]:
        if layout is None or action.subject.index is None:
            return ()
        return [(f"tie{t}", "all_reduce", 0) for t in sorted(layout.buckets[coord][action.subject.index].tied)]

    table: dict[str, Footprint] = {
        "WEIGH": lambda coord, action: [("dp", "all_reduce", 0)],
        "TIE": ties,
        "REDUCE": lambda coord, action: [("dp", "reduce_scatter", 0)],
        "CLIP": lambda coord, action: [("norm", "all_reduce", 0)],
        "UNSHARD": lambda coord, action: [("dp", "all_gather", 0)] if action.subject.kind == "params" else [],
    }
    return lambda coord, action: table[action.op](coord, action) if action.op in table else ()
