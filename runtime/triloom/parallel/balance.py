"""Stage layouts from costs: which contiguous units make up each stage so that the step is shortest. Pure.

The largest stage sum is not what counts: the first stages wait at the end of a step and the last ones
at its begin, transfers differ in size, and a schedule hides a long stage in one place and not in
another. So layouts are compared by their simulated makespan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations, pairwise
from math import comb, inf

from ..actions import Program
from ..errors import ConfigError
from ..simulate import Costs, Timeline, simulate
from .partition import partition

EXHAUSTIVE = 200
"""Layouts up to which all of them are tried."""

Cuts = tuple[int, ...]
"""First unit of each stage but the first."""


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """One microbatch in one unit, in the units of ``Costs``; measured, or counted (FLOPs)."""

    F: float
    B: float
    W: float
    held: float = 0.0
    """Memory from F to the backward."""
    deferred: float = 0.0
    """Memory from B to W."""
    out: float = 0.0
    """Bytes of the unit's output, which travels if the unit is the last of its stage."""


@dataclass(frozen=True)
class Balanced:
    """A layout and what it gives."""

    stages: tuple[range, ...]
    """Units of each stage."""
    timeline: Timeline
    tried: int
    """Layouts that were simulated."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of units of each stage: the ``stages`` of an engine."""
        return tuple(map(len, self.stages))


def balance(
    units: Sequence[UnitCost],
    program: Program,
    costs: Costs | None = None,
    *,
    sizes: Sequence[int] | None = None,
    memory: float = inf,
) -> Balanced:
    """The layout with the smallest simulated makespan of ``program``.

    program: a schedule for as many stages as are wanted. costs: links and ranks; its times and memory
    per stage are taken from the units. sizes: an explicit layout, which is only simulated. memory:
    largest peak of a rank. All layouts are tried if there are at most 200; else those near the one
    with the smallest largest sum and near the even one, until no move of a boundary, or of up
    to three neighbouring ones together, is an improvement. Raises ConfigError if no layout (tried) fits.
    """
    search = _Layouts(units, program, costs or Costs(), memory)
    count = len(program.stages)
    partition(len(units), count, sizes)  # refuses what cannot be laid out
    if sizes is not None:
        search.try_cuts(tuple(accumulate(sizes[:-1])))
    elif comb(len(units) - 1, count - 1) <= EXHAUSTIVE:
        for cuts in combinations(range(1, len(units)), count - 1):
            search.try_cuts(cuts)
    else:
        even = tuple(run.start for run in partition(len(units), count)[1:])
        for cuts in (smallest_largest_sum([u.F + u.B + u.W for u in units], count), even):
            search.descend(cuts)
    if search.best is None:
        raise ConfigError(
            f"none of {len(search.seen)} layouts of {len(units)} units in {count} stages keeps every rank of schedule "
            f"{program.name!r} within a memory of {memory}; the least peak is {search.least:g}: choose a schedule that "
            "holds fewer microbatches, recompute activations, or use more ranks"
        )
    return Balanced(ranges(search.best_cuts, len(units)), search.best, len(search.seen))


def smallest_largest_sum(weights: Sequence[float], parts: int) -> Cuts:
    """Contiguous parts, none empty, whose largest sum is as small as can be (dynamic programme, n^2 parts)."""
    n, sums = len(weights), [0.0, *accumulate(weights)]
    best = [sums[end] for end in range(n + 1)]
    choices: list[list[int]] = []
    for part in range(1, parts):
        row, choice = [inf] * (n + 1), [0] * (n + 1)
        for end in range(part + 1, n + 1):
            row[end], choice[end] = min((max(best[cut], sums[end] - sums[cut]), cut) for cut in range(part, end))
        best, choices = row, [*choices, choice]
    cuts, end = [], n
    for choice in reversed(choices):
        end = choice[end]
        cuts.append(end)
    return tuple(reversed(cuts))


def ranges(cuts: Cuts, units: int) -> tuple[range, ...]:
    return tuple(range(a, b) for a, b in pairwise((0, *cuts, units)))


def stage_costs(units: Sequence[UnitCost], stages: Sequence[range], costs: Costs) -> Costs:
    """Costs whose times and memory per stage are those of its units."""

    def total(name: str) -> list[float]:
        return [sum(getattr(units[u], name) for u in run) for run in stages]

    return replace(
        costs, F=total("F"), B=total("B"), W=total("W"), held=total("held"), deferred=total("deferred"),
        BW=None, R=None, boundary=[units[run[-1]].out for run in stages],
    )  # fmt: skip


class _Layouts:
    """Layouts that have been simulated, and the best."""

    def __init__(self, units: Sequence[UnitCost], program: Program, costs: Costs, memory: float) -> None:
        self.units, self.program, self.costs, self.memory = units, program, costs, memory
        self.seen: dict[Cuts, float] = {}
        self.best: Timeline | None = None
        self.best_cuts: Cuts = ()
        self.least = inf

    def try_cuts(self, cuts: Cuts) -> float:
        """Makespan of a layout, infinite if it does not fit the memory."""
        if cuts not in self.seen:
            stages = ranges(cuts, len(self.units))
            timeline = simulate(self.program, stage_costs(self.units, stages, self.costs))
            self.least = min(self.least, max(timeline.peak))
            fits = max(timeline.peak) <= self.memory
            self.seen[cuts] = timeline.makespan if fits else inf
            if fits and (self.best is None or timeline.makespan < self.best.makespan):
                self.best, self.best_cuts = timeline, cuts
        return self.seen[cuts]

    def descend(self, cuts: Cuts) -> None:
        """To the best neighbour as long as there is a better one; moves of one boundary come first."""
        here = self.try_cuts(cuts)
        for reach in (1, 3):
            near = ((self.try_cuts(c), c) for c in _neighbours(cuts, len(self.units), reach))
            there, best = min(near, default=(inf, cuts))
            if there < here:
                self.descend(best)
                return


def _neighbours(cuts: Cuts, units: int, reach: int) -> Iterator[Cuts]:
    """A run of up to ``reach`` boundaries one unit on or back."""
    for first in range(len(cuts)):
        for last in range(first + 1, min(first + reach, len(cuts)) + 1):
            for step in (1, -1):
                moved = (*cuts[:first], *(c + step for c in cuts[first:last]), *cuts[last:])
                if all(a < b for a, b in pairwise((0, *moved, units))):
                    yield moved
