"""Which units make up which stage of a planned run, by what they compute (``schedule.balance``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .config.show import plain
from .errors import ConfigError
from .foreseen import run_of
from .measured import Measures
from .optim import Optimizer
from .parallel.balance import UnitCost, balance
from .plan import Plan
from .trace import load
from .tracing import count_units


def deal(plan: Plan, optimizer: Optimizer) -> Plan:
    """The plan with its stages decided: contiguous units, so that the simulated step is shortest.

    Counting takes a second or two (units run once on fake tensors); every rank finds the same.
    """
    s = plan.config.schedule
    if s.balance == "even" or len(plan.order.stages) == 1:
        return plan
    units: Sequence[UnitCost] = [
        UnitCost(F=u.flops, B=u.input_flops, W=u.weight_flops, held=u.held, deferred=u.deferred, out=u.carriers)
        for u in count_units(run_of(plan, optimizer))
    ]
    if s.balance == "measured" and s.measured is not None:
        trace = load(s.measured)
        stages = trace.measurement.units
        if sum(map(len, stages)) != len(units):
            raise ConfigError(
                f"schedule.measured = {plain(s.measured)}: that run had {sum(map(len, stages))} units and this one has "
                f"{len(units)}; measure the same model, or use schedule.balance = counted"
            )
        units = timed(units, stages, trace.typical)
    sizes = balance(units, plan.order).sizes
    schedule = replace(s, stages=sizes, balance="even", measured=s.measured if s.kind == "auto" else None)
    return replace(plan, config=replace(plan.config, schedule=schedule))


def timed(units: Sequence[UnitCost], stages: Sequence[Sequence[int]], typical: Measures) -> list[UnitCost]:
    """Counted costs as times: those of a stage's units are scaled to what the stage was measured to take.

    stages: the units of each stage of the measured run. What counts as nothing in a stage shares its time evenly.
    """
    out = list(units)
    for s, run in enumerate(stages):
        seconds = {op: times[s] for op, times in typical.computes.items()}
        backward = _shares([units[u].B + units[u].W for u in run])
        parts = [_shares([getattr(units[u], op) for u in run]) for op in ("F", "B", "W")]
        for u, both, f, b, w in zip(run, backward, *parts, strict=True):
            weight = units[u].W / (units[u].B + units[u].W) if units[u].W else 0.0
            fused = seconds.get("BW", 0.0) * both
            out[u] = replace(
                units[u],
                F=seconds.get("F", 0.0) * f,
                B=seconds.get("B", 0.0) * b + fused * (1 - weight),
                W=seconds.get("W", 0.0) * w + fused * weight,
            )
    return out


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [v / total if total else 1 / len(values) for v in values]
