"""``schedule="auto"``: the first steps are measured, then the shortest program found for their times replaces theirs.

The stages stay where they are, so that the search looks at programs with one stage a rank. Which program runs does
not change a bit of losses and weights, so that it may change between two steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .actions import Action, Program, parse_program
from .errors import ConfigError
from .groups.base import Group
from .groups.objects import broadcast_object
from .measured import Measurement, Times, costs_of, measures
from .parallel.executor import Recorder
from .schedules import one_f_one_b, zb_h1
from .search import EFFORT, auto
from .simulate import simulate
from .spans import DeviceSpans, Spans, align, clock_offsets, gather_rows, spans_on


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The automatic schedule, as an engine's ``schedule``: ``Auto(memory=6)``; ``"auto"`` stands for ``Auto()``.

    Until it has measured, ZB-H1 runs, which times B and W apart and holds no more than 1F1B.
    """

    memory: float | None = None
    """Microbatches that a rank may hold, from F to the backward and from B to W; none: what the first rank of 1F1B
    holds, the smaller of ranks and microbatches."""
    warmup: int = 1
    """Steps that are not measured: memory is touched and kernels are compiled in the first."""
    steps: int = 3
    """Steps that are measured."""
    effort: int = EFFORT
    """Actions woven before the search ends; the default takes a second or two."""

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("steps", 1), ("effort", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"Auto.{name} = {getattr(self, name)} must be at least {least}")
        if self.memory is not None and not self.memory > 0:
            raise ConfigError(f"Auto.memory = {self.memory} must be above 0; leave it out for the memory of 1F1B")

    def __call__(self, ranks: int, microbatches: int) -> Program:
        """What runs until the program is chosen: a Schedule like others."""
        return (zb_h1 if ranks > 1 else one_f_one_b)(ranks, microbatches)

    def limit(self, ranks: int, microbatches: int) -> float:
        """Microbatches that a rank may hold."""
        return min(ranks, microbatches) if self.memory is None else self.memory


@dataclass(frozen=True)
class Choice:
    """What was chosen; the same on every rank."""

    program: Program
    text: str
    """Why, for people: makespans simulated with the measured times."""


class Chooser:
    """Measures the first steps of an engine and chooses its program. Collective over ``world``, made before step 0."""

    def __init__(
        self, rule: Auto, world: Group, measurement: Measurement, device: torch.device, record: Recorder | None
    ) -> None:
        self.rule, self._world, self._measurement = rule, world, measurement
        self._spans = spans_on(device)
        self._seen = 0
        self._rows: list[torch.Tensor] = []
        self._clocks = clock_offsets(world)
        self.recorder: Recorder = self._spans if record is None else Both(self._spans, record)
        """What the executor tells its spans until the choice is made."""

    def note(self) -> None:
        """After each step: keep its spans."""
        self._seen += 1
        if self._seen > self.rule.warmup:
            self._rows.append(self._spans.rows())

    def choose(self) -> Choice | None:
        """Before each step: the choice, once enough are measured. Takes a second or two then; collective."""
        if len(self._rows) < self.rule.steps:
            return None
        most = self._measurement.most
        times = [align(gather_rows(self._world, rows, most), self._clocks) for rows in self._rows]
        # On one rank: the others would find the same, but may share its cores.
        found = self._search(times) if self._world.rank == 0 else None
        csv, text = broadcast_object(self._world, found)
        return Choice(parse_program(csv), text)

    def _search(self, times: Sequence[Times]) -> tuple[str, str]:
        order = self._measurement.order
        costs = costs_of(measures(self._measurement, times))
        ranks, microbatches = len(order.ranks), order.microbatches
        found = auto(ranks, microbatches, costs, memory=self.rule.limit(ranks, microbatches), effort=self.rule.effort)
        usual = simulate(one_f_one_b(ranks, microbatches), costs)
        name = found.program.name
        return found.program.to_csv(), (
            f"schedule auto{'' if name == 'auto' else f' = {name}'}: {found.timeline.makespan:.4g} ms a step simulated "
            f"with the measured times, 1f1b {usual.makespan:.4g}, no program below {found.bound:.4g}; "
            f"bubble {found.timeline.bubble:.1%}, 1f1b {usual.bubble:.1%}"
        )


class Both:
    """Tells two recorders."""

    def __init__(self, first: Spans | DeviceSpans, second: Recorder) -> None:
        self._all: tuple[Recorder, Recorder] = (first, second)

    def begin(self, actions: int) -> None:
        self._each(lambda r: r.begin(actions))

    def action(self, action: Action, begin_ns: int, end_ns: int) -> None:
        self._each(lambda r: r.action(action, begin_ns, end_ns))

    def wait(self, begin_ns: int, end_ns: int) -> None:
        self._each(lambda r: r.wait(begin_ns, end_ns))

    def _each(self, tell: Callable[[Recorder], Any]) -> None:
        for recorder in self._all:
            tell(recorder)
