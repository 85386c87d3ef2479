"""From a schedule's order to the proven program of an engine: what each rank's state adds, and the proof."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .actions import COMPUTE, Program
from .groups.base import Group
from .groups.mesh_groups import MeshGroups
from .groups.objects import gather_objects
from .parallel.sharded import LocalParam, ShardedState
from .passes import BucketInfo, StateLayout
from .placement import Placement
from .verify import Verdict, inside, state_footprint, verify


def state_layout(stages: Sequence[range], state: ShardedState, params: Iterable[LocalParam], pp: Group) -> StateLayout:
    """Which units and ties use each bucket of every pipeline coordinate. Collective over pp."""
    uses: dict[str, set[int]] = {}
    for p in params:
        uses.setdefault(p.name, set()).add(p.unit)
    mine = [
        [
            sorted({u for s in b.bucket.slots for u in uses[s.name]}),
            sorted({t.index for s in b.bucket.slots if (t := state.params[s.name].tie) is not None}),
        ]
        for b in state.buckets
    ]
    rows = gather_objects(pp, mine)
    return StateLayout(
        tuple(tuple(run) for run in stages),
        tuple(tuple(BucketInfo(k, tuple(u), tuple(t)) for k, (u, t) in enumerate(row)) for row in rows),
    )


def prove(program: Program, layout: StateLayout, placement: Placement, groups: MeshGroups) -> Verdict:
    """The proof, with the collectives of tensor parallelism inside computes and those of the state actions."""
    of_state, tp = state_footprint(layout), groups.axis("tp").size
    return verify(
        program,
        lanes=groups.lanes,
        footprint=lambda coord, a: [("tp", "layers", 0)] if tp > 1 and a.op in COMPUTE else of_state(coord, a),
        groups={"tp": inside(len(program.ranks))},
        layout=layout,
        placement=placement,
    )
