"""What ``triloom train --dry-run`` prints: the resolved configuration, and the plan as TOML comments."""

from __future__ import annotations

from collections.abc import Iterator

from .choosing import Auto
from .config import to_toml
from .foreseen import table
from .grid import grid
from .parallel.partition import partition
from .plan import Plan
from .program_file import check, has_state, with_transfers
from .train import Job, make_optimizer


def describe(job: Job) -> str:
    """A TOML file for ``--config`` that says in comments what would run."""
    plan = "\n".join(f"# {line}".rstrip() for line in _plan_lines(job))
    return f"{to_toml(job.plan.config, 'resolved configuration')}\n{plan}"


def _plan_lines(job: Job) -> Iterator[str]:
    plan, config = job.plan, job.plan.config
    share = config.train.batch // plan.dp
    samples = config.train.steps * config.train.batch
    yield f"model: {plan.decoder.parameters:,} parameters"
    yield f"data: {job.data.about}"
    for name, windows, epochs in job.data.train.epochs(samples):
        yield f"  {epochs:.2g} epochs of {windows:,} windows of {config.model.seq} tokens: {name}"
    yield (
        f"run: {config.train.steps} steps of {config.train.batch} samples = {plan.tokens_per_step:,} tokens; "
        f"{share} samples a dp rank in {plan.microbatches} microbatches"
    )
    yield ""
    yield f"mesh: {plan.mesh}"
    yield from _ranks(plan)
    yield ""
    names = [*job.model.units, "loss"]
    for stage, run in enumerate(partition(len(names), len(plan.order.stages), config.schedule.stages)):
        yield f"stage {stage}: {' '.join(names[u] for u in run)}"
    yield ""
    yield from table(plan, make_optimizer(config))
    yield ""
    if isinstance(plan.schedule, Auto):
        yield "schedule auto: measured in the first steps, until then:"
    if has_state(plan.order):
        yield f"{plan.order.name}, by pipeline coordinate; it is verified when its units are there:"
        yield from grid(plan.order).splitlines()
        return
    yield f"{plan.order.name}, by pipeline coordinate, before the actions on sharded state are added:"
    verdict = check(plan.order)
    yield from grid(with_transfers(plan.order)).splitlines()
    yield f"proven: {'; '.join(verdict.proven)}"
    yield f"assumed: {'; '.join(verdict.assumed)}"
    yield f"microbatches in flight: {' '.join(map(str, verdict.in_flight))}"


def _ranks(plan: Plan, most: int = 16) -> Iterator[str]:
    for rank in range(min(plan.mesh.size, most)):
        yield f"  rank {rank}: " + " ".join(f"{axis} {at}" for axis, at in plan.mesh.coords(rank).items())
    if plan.mesh.size > most:
        yield f"  ... {plan.mesh.size - most} more"
