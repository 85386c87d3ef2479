"""Programs as tasks of plain numbers, which the replay can run fast. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..actions import COMPUTE as COMPUTE_OPS
from ..actions import STATE, TRANSFER, Action, Program, Subject, stage_of
from ..errors import ProgramError
from ..passes import INPUT_GRADIENT, StateLayout
from ..passes.resident import NEEDS_PARAMS
from .costs import Costs, per_hop

WORK, GATED, SEND, RECV, POST, BARRIER = range(6)
"""Kinds of tasks: at work on the main lane (GATED: once something is done that the rank has posted),
transfers, a collective on its lane, CLIP."""


class Task(NamedTuple):
    """kind; number of the tensor it needs (-1: none); seconds; number of what it makes, moves or posts; of
    the transfer of that the latency, seconds on the link, and number of the link; number of the post it waits for."""

    kind: int
    need: int
    seconds: float
    made: int
    latency: float = 0.0
    occupied: float = 0.0
    link: int = 0
    gate: int = -1


def hop(costs: Costs, where: Sequence[int], kind: str, stage: int) -> tuple[float, float]:
    """Latency and seconds on the link of a stage's activation (``act``) or input gradient (``grad``).

    Nothing if there is no stage to take it, or if that is on the same coordinate.
    """
    other = stage + 1 if kind == "act" else stage - 1
    if not 0 <= other < len(where) or where[other] == where[stage]:
        return 0.0, 0.0
    size = costs.bytes_out(where)[min(stage, other)]
    return per_hop(costs.comm, where[stage], where[other]), size / per_hop(costs.bandwidth, where[stage], where[other])


class Lowering:
    """Numbers of boundary tensors and buckets, and a table of functions from Action to Task."""

    def __init__(self, program: Program, costs: Costs, layout: StateLayout | None, explicit: bool) -> None:
        self.program, self.costs, self.layout, self.explicit = program, costs, layout, explicit
        self.where, self.count = program.stages, program.microbatches
        self.stage_of_unit = {u: s for s, units in enumerate(layout.units) for u in units} if layout else {}
        self.tensors = 2 * len(self.where) * self.count
        """Numbers given: boundary tensors first, then one for each post."""
        self.posted: dict[Subject, int] = {}
        """The last post about a subject on the rank at hand."""
        used = {a.op for row in program.ranks for a in row}
        self.seconds = {op: costs.seconds(op, self.where) for op in COMPUTE_OPS if op in used}
        self.hops = [self._hop("act", s) for s in range(len(self.where))]
        self.hops += [self._hop("grad", s) for s in range(len(self.where))]
        self.table: dict[str, Callable[[int, Action], Task]] = {
            **dict.fromkeys(COMPUTE_OPS, self._compute),
            **dict.fromkeys(TRANSFER, self._transfer),
            **dict.fromkeys(STATE, self._main),
            "REDUCE": self._post,
            "UNSHARD": self._unshard,
            "RESHARD": self._reshard,
            "STEP": self._step,
            "CLIP": self._clip,
        }

    def rows(self) -> list[list[Task]]:
        rows = []
        for rank, row in enumerate(self.program.ranks):
            self.posted = {}
            rows.append([self.table[a.op](rank, a) for a in row])
        return rows

    def _hop(self, kind: str, stage: int) -> tuple[float, float, int]:
        """Latency, seconds on the link and number of the link of a stage's activation or gradient."""
        other = stage + 1 if kind == "act" else stage - 1
        if not 0 <= other < len(self.where) or self.where[other] == self.where[stage]:
            return 0.0, 0.0, -1
        link = self.where[stage] * len(self.program.ranks) + self.where[other]
        return *hop(self.costs, self.where, kind, stage), link

    # -- computes ------------------------------------------------------------------------------------

    def _compute(self, rank: int, action: Action) -> Task:
        if action.subject.kind == "unit":
            task = self._unit(action)
        else:
            stage = action.subject.index or 0
            task = self._ends(action.op, stage, action.microbatch or 0, self.seconds[action.op][stage], True, True)
        if self.posted and self.layout is not None and action.op in NEEDS_PARAMS:
            return self._gated(task, [Subject("params", b.index) for b in self.layout.touched(rank, action)])
        return task

    def _ends(self, op: str, stage: int, microbatch: int, seconds: float, first: bool, last: bool) -> Task:
        """first: the part that takes the stage's input of this direction; last: the part that makes its output."""
        stages, m = len(self.where), self.count
        if op == "F":
            need = (stage - 1) * m + microbatch if first and stage > 0 else -1
            made, line = stage * m + microbatch if last and stage + 1 < stages else -1, stage
        elif op in INPUT_GRADIENT:
            need = (stages + stage + 1) * m + microbatch if first and stage + 1 < stages else -1
            made, line = (stages + stage) * m + microbatch if last and stage > 0 else -1, stages + stage
        else:
            return Task(WORK, -1, seconds, -1)
        if made >= 0 and self.explicit and self.hops[line][2] >= 0:
            made = -1  # its SEND hands it over
        return Task(WORK, need, seconds, made, *self.hops[line])

    def _unit(self, action: Action) -> Task:
        unit, op = action.subject.index or 0, action.op
        if self.layout is None or unit not in self.stage_of_unit:
            raise ProgramError(f"{action}: simulate needs a layout that says which stage unit {unit} belongs to")
        stage = self.stage_of_unit[unit]
        units = self.layout.units[stage] if op in ("F", "R") else self.layout.units[stage][::-1]
        seconds = self.costs.units.get((op, unit), self.seconds[op][stage] / len(units))
        return self._ends(op, stage, action.microbatch or 0, seconds, unit == units[0], unit == units[-1])

    # -- transfers and state -------------------------------------------------------------------------

    def _transfer(self, rank: int, action: Action) -> Task:
        stages, stage = len(self.where), stage_of(action)
        line = stage if action.subject.kind == "act" else stages + stage
        key = line * self.count + (action.microbatch or 0)
        kind, need = (SEND, -1) if action.op == "SEND" else (RECV, -1)
        return Task(kind, need, self.costs.overhead, key, *self.hops[line])

    def _gated(self, task: Task, subjects: Sequence[Subject]) -> Task:
        """After what was last posted about the subjects: posts of a rank end in their order."""
        gate = max((self.posted[s] for s in subjects if s in self.posted), default=-1)
        return task if gate < 0 else task._replace(kind=GATED, gate=gate)

    def _main(self, rank: int, action: Action) -> Task:
        return Task(WORK, -1, self.costs.state.get(action.op, 0.0), -1)

    def _post(self, rank: int, action: Action) -> Task:
        self.posted[action.subject] = self.tensors
        self.tensors += 1
        return Task(POST, -1, self.costs.state.get(action.op, 0.0), self.tensors - 1)

    def _unshard(self, rank: int, action: Action) -> Task:
        """Parameters are gathered; for gradients it only makes room."""
        return self._post(rank, action) if action.subject.kind == "params" else Task(WORK, -1, 0.0, -1)

    def _reshard(self, rank: int, action: Action) -> Task:
        return self._gated(self._main(rank, action), [action.subject])

    def _step(self, rank: int, action: Action) -> Task:
        return self._gated(self._main(rank, action), [Subject("grads", action.subject.index)])

    def _clip(self, rank: int, action: Action) -> Task:
        return Task(BARRIER, -1, self.costs.state.get("CLIP", 0.0), -1)
