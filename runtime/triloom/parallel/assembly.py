"""Building what a rank holds, one unit at a time.

A unit is built, gets the values of the first rank that holds it, and its parameters are handed to the sharded state
before the next one is built: the most that is there at once is one unit, the buckets that are not full yet, and the
shards. So a model is built that as a whole would not fit into a rank's memory (give units as functions of a Scope).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn

from ..groups.base import Group
from ..groups.mesh_groups import MeshGroups
from ..scope import Scope
from ..together import together
from . import build
from .build import Collector, UnitLike
from .sharded import LocalParam, ShardedState
from .ties import Tie


def assemble(
    named: Mapping[str, UnitLike],
    coord_of: Sequence[int],
    *,
    scope: Scope,
    ties: Sequence[Tie],
    tie_groups: Mapping[int, Group],
    groups: MeshGroups,
    world: Group,
    state: ShardedState,
) -> tuple[dict[int, nn.Module], Collector]:
    """The modules of this rank by unit number, their parameters in ``state``. Collective over the world.

    coord_of: pipeline coordinate of every unit. Raises ConfigError on every rank if a unit cannot be built on one.
    """
    mine = [u for u, c in enumerate(coord_of) if c == state.coord]
    collector, modules = Collector(list(named), ties), dict[int, nn.Module]()
    rounds = max(coord_of.count(c) for c in set(coord_of))
    for turn in range(rounds):

        def local(wanted: Sequence[int] = mine[turn : turn + 1]) -> tuple[dict[int, nn.Module], list[LocalParam]]:
            built = build.build_units(named, wanted, scope)
            return built, [p for u, module in built.items() for p in collector.add(u, module)]

        built, params = together(world, local)
        build.replicate(built, params, groups)
        modules |= built
        together(world, partial(state.add, params))
    together(world, lambda: collector.check_ties(modules))
    together(world, state.finish)
    build.replicate_ties(state, tie_groups)
    return modules, collector
