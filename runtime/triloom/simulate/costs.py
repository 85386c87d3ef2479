"""The cost model of a program: seconds, bytes and links. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from ..actions import OPS
from ..errors import ConfigError

PerStage = float | Sequence[float]
"""A number for one rank's whole share of the model, or one number per stage.

A share is divided by the stages that the rank runs, so that schedules with one and with several
stages a rank are compared on the same model.
"""

PerHop = float | Callable[[int, int], float]
"""One number for every hop, or a function of source and destination coordinate."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one microbatch costs. Any unit of time and of memory; they come back in the timeline."""

    F: PerStage = 1.0
    B: PerStage = 1.0
    """Input gradient."""
    W: PerStage = 1.0
    """Weight gradient."""
    BW: PerStage | None = None
    """Both in one; B + W if left out."""
    R: PerStage | None = None
    """Recompute; F if left out."""
    second_pass: PerStage = 0.0
    """What a separate W takes longer where it is a second autograd pass (``triloom.second_pass``)."""
    rank: Sequence[float] | None = None
    """Factor on the computes of each coordinate (a slow device); 1 if left out."""
    units: Mapping[tuple[str, int], float] = field(default_factory=dict)
    """Seconds of (operation, unit) in programs with unit actions; an equal part of the stage's if left out."""

    comm: PerHop = 0.0
    """One-way latency of a hop: a delay, not an occupation."""
    bandwidth: PerHop = math.inf
    """Bytes a second of a hop and direction; transfers on it follow one another."""
    boundary: PerStage = 0.0
    """Bytes of a stage's output; its gradient is as large. A single number holds for every stage."""
    rendezvous: bool = False
    """A transfer begins only when its receive is posted too, as without any buffering."""
    blocking: bool = False
    """A sender computes on only when its transfer is over."""
    overhead: float = 0.0
    """Seconds of its own time that a rank spends on each send and on each receive: what does not overlap."""

    held: PerStage = 1.0
    """Memory from the start of F to the end of the backward (B or BW)."""
    kept: PerStage = 0.0
    """Memory from F to R in programs that recompute: what went into the units. ``held`` then counts from R on."""
    deferred: PerStage | None = None
    """Memory from the end of B to the end of W; as much as ``held`` if left out."""

    state: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each state action (REDUCE, STEP, ...); 0 if left out."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            numbers = (
                value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else [value]
            )
            for x in numbers:
                if isinstance(x, int | float) and not x >= 0:
                    raise ConfigError(f"costs are numbers from 0 up, {f.name} has {x!r}")
        unknown = [op for op in self.state if op not in OPS]
        if unknown:
            raise ConfigError(f"costs.state has times of {unknown}, the operations are {', '.join(OPS)}")

    def seconds(self, op: str, where: Sequence[int]) -> list[float]:
        """Seconds of a compute operation for each stage; ``where`` is the coordinate of each stage."""
        if op == "BW" and self.BW is None:
            each = [b + w for b, w in zip(per_stage("B", self.B, where), per_stage("W", self.W, where), strict=True)]
        else:
            value = self.F if op == "R" and self.R is None else getattr(self, op)
            each = per_stage(op, value, where)
        if op == "W":
            each = [w + more for w, more in zip(each, per_stage("second_pass", self.second_pass, where), strict=True)]
        if self.rank is None:
            return each
        if len(self.rank) <= max(where):
            raise ConfigError(f"costs.rank has {len(self.rank)} factors for {max(where) + 1} pipeline coordinates")
        return [t * self.rank[c] for t, c in zip(each, where, strict=True)]

    def fits(self, where: Sequence[int]) -> bool:
        """Whether every list of costs has a number for each of these stages."""
        lists = (getattr(self, f.name) for f in fields(self) if f.name not in ("rank", "units", "state"))
        return all(len(x) == len(where) for x in lists if isinstance(x, Sequence))

    def memory(self, where: Sequence[int]) -> tuple[list[float], list[float]]:
        """What each stage holds from F to the backward, and from B to W."""
        deferred = self.held if self.deferred is None else self.deferred
        return per_stage("held", self.held, where), per_stage("deferred", deferred, where)

    def kept_by_stage(self, where: Sequence[int]) -> list[float]:
        """What each stage holds from F to R."""
        return per_stage("kept", self.kept, where)

    def bytes_out(self, where: Sequence[int]) -> list[float]:
        """Bytes of the output of each stage."""
        if isinstance(self.boundary, Sequence):
            return per_stage("boundary", self.boundary, where)
        return [self.boundary] * len(where)


def per_stage(name: str, value: PerStage, where: Sequence[int]) -> list[float]:
    """A cost for each stage; a single number is shared by the stages of a coordinate."""
    if isinstance(value, Sequence):
        if len(value) != len(where):
            raise ConfigError(f"costs.{name} has {len(value)} numbers for {len(where)} stages")
        return [float(x) for x in value]
    return [value / where.count(c) for c in where]


def per_hop(value: PerHop, source: int, destination: int) -> float:
    return value(source, destination) if callable(value) else value
