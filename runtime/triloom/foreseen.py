"""The memory of a training run: foreseen from its plan, and compared with what the ranks saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from .errors import ConfigError
from .estimate import estimate
from .memory import Report
from .mesh import Mesh
from .models import decoder
from .optim import Optimizer
from .parallel.reduction import REDUCTIONS
from .plan import Plan
from .tracing import Run

MIB = 2**20


def foresee(plan: Plan, optimizer: Optimizer, device: torch.device | None = None) -> tuple[Report, ...]:
    """Bytes of a rank at each pipeline coordinate; allocates nothing of the model. device: the CPU if left out."""
    return estimate(run_of(plan, optimizer, device))


def run_of(plan: Plan, optimizer: Optimizer, device: torch.device | None = None) -> Run:
    """A planned run as something to trace without allocating it."""
    config = plan.config
    model = decoder(plan.decoder)  # an own one: rotation tables that it remembers must not be fake
    tokens = ((config.train.batch // plan.dp, config.model.seq), torch.int64)
    return Run(
        units=model.units,
        loss=model.loss,
        ties=model.ties,
        mesh=plan.mesh,
        order=plan.order,
        optimizer=optimizer,
        placement=plan.placement,
        reduction=REDUCTIONS[config.placement.reduction](),
        inputs=tokens,
        targets=tokens,
        stages=config.schedule.stages,
        sequence_parallel=config.parallel.sequence,
        dtype=getattr(torch, config.train.dtype),
        device=str(device or "cpu"),
    )


def table(plan: Plan, optimizer: Optimizer) -> Iterator[str]:
    """Foreseen peaks in MiB: a line per class, a column per pipeline coordinate."""
    yield "memory of a rank at its peak, MiB, by pipeline coordinate (dp and tp ranks are alike):"
    try:
        reports = foresee(plan, optimizer)
    except ConfigError as error:
        yield f"  {error}"
        return
    kinds = [k for k in reports[0].peak if any(r.peak[k] for r in reports)]
    wide = max(map(len, [*kinds, "all at once"]))
    for kind in kinds:
        yield f"  {kind:{wide}}" + _row([r.peak[kind] for r in reports])
    yield f"  {'all at once':{wide}}" + _row([r.total for r in reports])


def _row(sizes: Sequence[int]) -> str:
    return "".join(f" {size / MIB:10.2f}" for size in sizes)


def compared(plan: Plan, optimizer: Optimizer, seen: Sequence[Mapping[str, int]], device: torch.device) -> str:
    """One line on how near the estimate came. seen: peaks of every rank by class, and their ``total``."""
    try:
        foreseen = [r.total for r in foresee(plan, optimizer, device)]
    except ConfigError as error:
        return f"memory was not foreseen: {error}"
    ratios = [foreseen[_coord(plan.mesh, rank)] / one["total"] for rank, one in enumerate(seen)]
    worst = max(ratios, key=lambda r: abs(r - 1))
    largest = max(range(len(seen)), key=lambda rank: seen[rank]["total"])
    return (
        f"memory foreseen for rank {largest}: {foreseen[_coord(plan.mesh, largest)] / MIB:.1f} MiB, seen "
        f"{seen[largest]['total'] / MIB:.1f}; furthest off on any rank {worst - 1:+.1%}"
    )


def _coord(mesh: Mesh, rank: int) -> int:
    return mesh.coords(rank)["pp"]
