"""From a schedule's order to the proven program of an engine: what each rank's state adds, and the proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

from .actions import COMPUTE, Program
from .errors import ConfigError
from .groups.base import Group
from .groups.mesh_groups import MeshGroups
from .groups.objects import gather_objects
from .parallel.sharded import ShardedState
from .passes import BucketInfo, StateLayout, add_communication, add_state, whole_stages
from .placement import Placement
from .schedules import forwards
from .verify import Verdict, inside, state_footprint, verify


def state_layout(stages: Sequence[range], state: ShardedState, pp: Group) -> StateLayout:
    """Which units and ties use each bucket of every pipeline coordinate. Collective over pp."""
    rows = gather_objects(pp, [astuple(info) for info in state.infos()])
    return StateLayout(
        tuple(tuple(run) for run in stages),
        tuple(tuple(BucketInfo(k, tuple(u), tuple(t), stays) for k, u, t, stays in row) for row in rows),
    )


def evaluation(order: Program, layout: StateLayout, placement: Placement) -> Program:
    """The forwards of a schedule, or of a complete program, as a program of their own."""
    return add_state(add_communication(forwards(whole_stages(order, layout))), layout, placement)


def needs_headers(shapes: str) -> bool:
    """Whether activations travel behind a header with their shapes; raises ConfigError for an unknown ``shapes``."""
    if shapes not in ("batch", "data"):
        raise ConfigError(f"shapes between stages follow from 'batch' or 'data', got shapes={shapes!r}")
    return shapes == "data"


def prove(program: Program, layout: StateLayout, placement: Placement, groups: MeshGroups, headers: bool) -> Verdict:
    """The proof, with the collectives of tensor parallelism inside computes and those of the state actions.

    headers: shapes of activations travel with them.
    """
    of_state, tp = state_footprint(layout), groups.axis("tp").size
    return verify(
        program,
        lanes=groups.lanes,
        footprint=lambda coord, a: (
            [("tp", "layers", 0)] if tp > 1 and a.op in (*COMPUTE, "STEP") else of_state(coord, a)
        ),
        groups={"tp": inside(len(program.ranks))},
        layout=layout,
        placement=placement,
        headers=headers,
    )
