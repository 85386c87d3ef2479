"""What each rank will hold at its peak, found without allocating the model or starting a rank.

The units are built and run once on fake tensors, which have shapes, dtypes and a device but no memory, so that
what autograd would save is traced with the very kernels of the device; the sharded state is laid out by the code
that a run uses; then the program is walked (``memory.walk``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from .actions import Program
from .budget import fit
from .errors import ConfigError, TriloomError
from .groups.phantom import Phantom
from .memory import Report, Sizes, UnitBytes, walk
from .mesh import Mesh
from .optim import Optimizer
from .parallel import build, cut
from .parallel.accounting import bucket_classes, bucket_moves, fixed_bytes
from .parallel.activations import closure_bytes, saved_tensors, unit_bytes
from .parallel.build import UnitLike
from .parallel.partition import partition
from .parallel.sharded import LocalParam, ShardedState
from .passes import StateLayout, add_recompute, recomputed_units
from .placement import Placement
from .program_file import complete
from .scope import GradWriter, Scope
from .shards import split_even


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be estimated; the arguments of an Engine, with shapes for a batch."""

    units: Mapping[str, UnitLike]
    loss: UnitLike
    mesh: Mesh
    order: Program
    """Of computes, with transfers, or complete."""
    optimizer: Optimizer
    placement: Placement
    inputs: Any
    """Pytree of (shape, dtype) of what a dp rank passes to ``step``, whole."""
    targets: Any
    ties: Sequence[Sequence[str]] = ()
    stages: Sequence[int] | None = None
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def estimate(run: Run) -> tuple[Report, ...]:
    """Bytes of a rank at each pipeline coordinate; those of its dp and tp ranks are alike (rank 0 of both is taken).

    Raises ConfigError for units that are modules already (give functions of a Scope), or that cannot be run
    without values.
    """
    _check_factories(run)
    named = build.name_units(run.units, run.loss)
    stages = partition(len(named), len(run.order.stages), run.stages)
    coord_of = [run.order.stages[s] for s, units in enumerate(stages) for _ in units]
    with _fake(), torch.device(run.device):
        scope = _scope(run)
        modules = build.build_units(named, range(len(named)), scope)
        sizes = _trace(run, list(named), modules, scope)
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


def _check_factories(run: Run) -> None:
    for name, unit in [*run.units.items(), (build.LOSS, run.loss)]:
        if isinstance(unit, nn.Module) and any(True for _ in unit.parameters()):
            raise ConfigError(
                f"unit {name!r} has its parameters already; give a function of a Scope that builds it, so that its "
                "memory can be estimated without taking it"
            )


@contextmanager
def _fake() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fake tensors warn of being asked where they are
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def _scope(run: Run) -> Scope:
    tp = run.mesh.axis("tp")
    return Scope(
        tp=Phantom(0, tp, "tp"),
        sequence_parallel=run.sequence_parallel and tp > 1,
        device=torch.device(run.device),
        dtype=run.dtype,
        selective=run.placement.activations == "selective",
    )


class _Kept:
    """A sink that keeps every closure, as between B and W."""

    immediate = False

    def __init__(self) -> None:
        self.writers: list[GradWriter] = []

    def add(self, param: nn.Parameter, write: GradWriter) -> None:
        self.writers.append(write)


def _trace(run: Run, names: Sequence[str], modules: Mapping[int, nn.Module], scope: Scope) -> Sizes:
    """Bytes of each unit for every size of microbatch."""
    batch = pytree.tree_leaves(run.inputs, is_leaf=_is_meta)[0][0][0]
    counts = [stop - start for start, stop in split_even(batch, run.order.microbatches)]
    by_count = {n: _trace_one(run, names, modules, scope, n) for n in dict.fromkeys(counts)}
    return lambda unit, mb: by_count[counts[mb]][unit]


def _is_meta(x: Any) -> bool:
    return isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], torch.dtype)


def _tensors(run: Run, metas: Any, samples: int) -> Any:
    def make(meta: Any) -> torch.Tensor:
        (_, *rest), dtype = meta
        return torch.empty(samples, *rest, dtype=dtype, device=run.device)

    return pytree.tree_map(make, metas, is_leaf=_is_meta)


def _trace_one(
    run: Run, names: Sequence[str], modules: Mapping[int, nn.Module], scope: Scope, samples: int
) -> dict[int, UnitBytes]:
    x = cut.boundary(_tensors(run, run.inputs, samples))
    targets = _tensors(run, run.targets, samples)
    out: dict[int, UnitBytes] = {}
    for u, module in sorted(modules.items()):
        extra = (targets,) if u == len(modules) - 1 else ()
        try:
            x, out[u] = _trace_unit(u, module, x, extra, scope)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, TriloomError):
                raise
            raise ConfigError(
                f"unit {names[u]!r} cannot be run without values, so its memory cannot be estimated: "
                f"{type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error
    return out


def _trace_unit(
    u: int, module: nn.Module, x: cut.Boundary, extra: tuple[Any, ...], scope: Scope
) -> tuple[cut.Boundary, UnitBytes]:
    sink = _Kept()
    scope.unit, scope.grads = u, sink
    with FlopCounterMode(display=False) as counter, saved_tensors() as saved:
        made, record = cut.forward(module, x, *extra)
    sizes = unit_bytes(module, saved, [*x.leaves, *pytree.tree_leaves(extra)], made)
    saved.clear()
    params = [p for p in module.parameters() if p.requires_grad]
    cut.backward(record, [torch.empty_like(y) for y in made.carriers()], params, sink)
    return made, replace(sizes, flops=counter.get_total_flops(), deferred=closure_bytes(module, sink.writers))


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
    batch = pytree.tree_leaves((run.inputs, run.targets), is_leaf=_is_meta)
    held["batch"] = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in batch)
    held["fixed"] = fixed_bytes(modules.values())
    row, units = program.ranks[coord], sum(map(len, layout.units))
    recomputed = recomputed_units(run.placement, units)
    if run.placement.activation_bytes is not None:
        known = {u: sizes(u, 0) for u in range(units)}
        recomputed = fit(row, layout, coord, known, run.placement.activation_bytes)
    moves = [bucket_moves(b) for b in state.buckets]
    return walk(row, layout, sizes, state=held, buckets=moves, recomputed=recomputed)
