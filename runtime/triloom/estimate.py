"""What each rank will hold at its peak, found without allocating the model or starting a rank.

The units are built and run once on fake tensors, which have shapes, dtypes and a device but no memory, so that
what autograd would save is traced with the very kernels of the device; the sharded state is laid out by the code
that a run uses; then the program is walked (``memory.walk``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .actions import Program
from .budget import fit
from .groups.phantom import Phantom
from .memory import Report, Sizes, walk
from .parallel import build
from .parallel.accounting import bucket_classes, bucket_moves, fixed_bytes
from .parallel.partition import partition
from .parallel.sharded import LocalParam, ShardedState
from .passes import StateLayout, add_recompute, recomputed_units
from .program_file import complete
from .tracing import Run, check_factories, fake, is_meta, scope_of, trace


def estimate(run: Run) -> tuple[Report, ...]:
    """Bytes of a rank at each pipeline coordinate; those of its dp and tp ranks are alike (rank 0 of both is taken).

    Raises ConfigError for units that are modules already (give functions of a Scope), or that cannot be run
    without values.
    """
    check_factories(run)
    named = build.name_units(run.units, run.loss)
    stages = partition(len(named), len(run.order.stages), run.stages)
    coord_of = [run.order.stages[s] for s, units in enumerate(stages) for _ in units]
    with fake(), torch.device(run.device):
        scope = scope_of(run)
        modules = build.build_units(named, range(len(named)), scope)
        sizes = trace(run, list(named), modules, scope)
        ties = build.find_ties(named, run.ties, coord_of)
        coords = range(len(run.order.ranks))
        mine = [{u: m for u, m in modules.items() if coord_of[u] == c} for c in coords]
        params = [build.collect(named, m, ties) for m in mine]
        states = [_state(run, p, c) for c, p in zip(coords, params, strict=True)]
        layout = StateLayout(tuple(map(tuple, stages)), tuple(state.infos() for state in states))
        program = _program(run, layout, len(named))
        return tuple(
            _walk(run, program, layout, c, state, modules_c, sizes)
            for c, state, modules_c in zip(coords, states, mine, strict=True)
        )


def _state(run: Run, params: Sequence[LocalParam], coord: int) -> ShardedState:
    dp = run.mesh.axis("dp")
    shard = run.placement.shard_ranks or dp
    state = ShardedState(
        dp=Phantom(0, shard, "dp"),
        replicas=Phantom(0, dp // shard, "replicas"),
        tp=Phantom(0, run.mesh.axis("tp"), "tp"),
        coord=coord,
        tie_groups={},
        placement=run.placement,
        optimizer=run.optimizer,
        device=torch.device(run.device),
        reduction=run.reduction,
    )
    for _, unit in groupby(params, key=lambda p: p.unit):
        state.add(list(unit))
    state.finish()
    return state


def _program(run: Run, layout: StateLayout, units: int) -> Program:
    order = add_recompute(run.order) if recomputed_units(run.placement, units) else run.order
    return complete(order, layout, run.placement)


def _walk(
    run: Run,
    program: Program,
    layout: StateLayout,
    coord: int,
    state: ShardedState,
    modules: Mapping[int, nn.Module],
    sizes: Sizes,
) -> Report:
    held: dict[str, int] = {}
    for b in state.buckets:
        for kind, nbytes in bucket_classes(b).items():
            held[kind] = held.get(kind, 0) + nbytes
    batch = pytree.tree_leaves((run.inputs, run.targets), is_leaf=is_meta)
    held["batch"] = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in batch)
    held["fixed"] = fixed_bytes(modules.values())
    row, units = program.ranks[coord], sum(map(len, layout.units))
    recomputed = recomputed_units(run.placement, units)
    if run.placement.activation_bytes is not None:
        known = {u: sizes(u, 0) for u in range(units)}
        recomputed = fit(row, layout, coord, known, run.placement.activation_bytes)
    moves = [bucket_moves(b, state.staging(b)) for b in state.buckets]
    return walk(row, layout, sizes, state=held, buckets=moves, recomputed=recomputed)
