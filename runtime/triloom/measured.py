"""Measured steps: the bubble and what it is made of, costs for the simulator, the largest differences. Pure.

The times of a step are an int64 array (ranks, actions, 4) of nanoseconds on one clock, the columns being
those of :mod:`triloom.spans`: begin, end, waited, until. Rank r runs the list of its pipeline coordinate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .actions import COMPUTE, Action, Program, Subject, replace_ranks
from .mesh import Mesh
from .simulate import Costs

Times = NDArray[np.int64]
BEGIN, END, WAITED, UNTIL = range(4)


class Seat(NamedTuple):
    """Where a rank sits: its pipeline coordinate, and which of the pipelines side by side it is part of."""

    coord: int
    replica: int


class Whole(NamedTuple):
    """A compute action of a stage, and the places of its parts in the rank's list (one, or one per unit)."""

    action: Action
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Figures:
    """A step's pipeline. The shares are of ranks x time, and sum to ``bubble``."""

    ms: float
    """From the begin of the first compute action of any rank to the end of the last one."""
    bubble: float
    """1 - busy / (ranks x time); busy is the time inside F, B, BW, W and R without waits for receives."""
    idle: float
    """In no action, or (after its last compute) in one that waits for the end of the step."""
    receive: float
    """Waiting for a tensor that the other rank had not sent yet."""
    transfer: float
    """Waiting for a tensor that was on its way."""
    other: float
    """In actions that do not compute, before the rank's last compute: posting transfers, sharded state."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """A program and who ran it. units: the units of each stage; seats: of every rank of the world."""

    program: Program
    units: tuple[tuple[int, ...], ...]
    seats: tuple[Seat, ...]

    @property
    def most(self) -> int:
        """Actions of the longest list."""
        return max(map(len, self.program.ranks))

    @cached_property
    def _stage_of_unit(self) -> dict[int, int]:
        return {u: s for s, units in enumerate(self.units) for u in units}

    def stage_of(self, action: Action) -> int:
        """The stage of a compute action, of a whole stage or of a unit."""
        index = action.subject.index or 0
        return index if action.subject.kind == "stage" else self._stage_of_unit[index]

    @cached_property
    def wholes(self) -> tuple[tuple[Whole, ...], ...]:
        """Per coordinate, its compute actions by stage, in order of their first part."""
        return tuple(tuple(self._join(row)) for row in self.program.ranks)

    def _join(self, row: Sequence[Action]) -> Iterator[Whole]:
        parts: dict[Action, list[int]] = {}
        for i, a in enumerate(row):
            if a.op in COMPUTE:
                whole = Action(a.op, Subject("stage", self.stage_of(a)), a.microbatch)
                parts.setdefault(whole, []).append(i)
        return (Whole(action, tuple(rows)) for action, rows in parts.items())

    @property
    def order(self) -> Program:
        """The schedule: computes of whole stages, for the simulator."""
        return replace_ranks(self.program, ([w.action for w in row] for row in self.wholes))

    def figures(self, times: Times) -> Figures:
        """The bubble of a step, taken apart."""
        computes = self.computes
        begin, end, waited = times[..., BEGIN], times[..., END], times[..., WAITED]
        first = int(begin[computes].min())
        ns = int(end[computes].max()) - first
        total = len(self.seats) * ns or 1
        waits = int(waited[computes].sum())
        busy = int((end - begin)[computes].sum()) - waits
        last = np.where(computes, end, 0).max(axis=1, keepdims=True)
        other = int(np.maximum(end - np.maximum(begin, first), 0)[~computes & (end <= last)].sum())
        transfer = int(self.transfers(times)[1].sum())
        idle = total - busy - waits - other
        shares = (x / total for x in (total - busy, idle, waits - transfer, transfer, other))
        return Figures(ns / 1e6, *shares)

    def transfers(self, times: Times) -> tuple[NDArray[np.intp], Times]:
        """The waits for receives: rank and row of each (n, 2), and the nanoseconds of it (n,) in which the tensor
        was on its way: from the begin of its SEND, or of the wait, to the wait's end."""
        rank, row, source, sent = self.receives
        until, waited = times[rank, row, UNTIL], times[rank, row, WAITED]
        under_way = until - np.maximum(times[source, sent, BEGIN], until - waited)
        return np.stack([rank, row], axis=1), np.where(waited > 0, np.clip(under_way, 0, waited), 0)

    @cached_property
    def computes(self) -> NDArray[np.bool_]:
        """(ranks, actions): which rows are compute actions."""
        by_coord = np.zeros((len(self.program.ranks), self.most), dtype=np.bool_)
        for coord, row in enumerate(self.program.ranks):
            by_coord[coord, : len(row)] = [a.op in COMPUTE for a in row]
        return by_coord[[seat.coord for seat in self.seats]]

    @cached_property
    def receives(self) -> NDArray[np.intp]:
        """(4, n): rank and row of each compute that takes a received tensor, rank and row of the SEND of that."""
        rank_at = {(s.replica, s.coord): r for r, s in enumerate(self.seats)}
        found = [
            (rank, row, rank_at[seat.replica, coord], sent)
            for rank, seat in enumerate(self.seats)
            for row, coord, sent in self._receives_of(seat.coord)
        ]
        return np.array(found, dtype=np.intp).reshape(-1, 4).T

    def _receives_of(self, coord: int) -> Iterator[tuple[int, int, int]]:
        """Row of a compute of a coordinate; coordinate and row of the SEND whose tensor it takes."""
        sends = {
            (a.subject, a.microbatch): (c, i)
            for c, row in enumerate(self.program.ranks)
            for i, a in enumerate(row)
            if a.op == "SEND" and a.peer == coord
        }
        for whole in self.wholes[coord]:
            subject = _input(whole.action)
            if subject is not None and (subject, whole.action.microbatch) in sends:
                yield whole.rows[0], *sends[subject, whole.action.microbatch]


def _input(action: Action) -> Subject | None:
    """The boundary tensor of another stage that a compute action takes."""
    stage = action.subject.index or 0
    if action.op == "F":
        return Subject("act", stage - 1)
    return Subject("grad", stage + 1) if action.op in ("B", "BW") else None


def measurement(program: Program, units: Sequence[Sequence[int]], mesh: Mesh) -> Measurement:
    """``program`` on the ranks of ``mesh``. units: of each stage."""
    replicas: dict[tuple[int, ...], int] = {}
    seats = []
    for rank in range(mesh.size):
        coords = mesh.coords(rank)
        others = tuple(at for axis, at in coords.items() if axis != "pp")
        seats.append(Seat(coords.get("pp", 0), replicas.setdefault(others, len(replicas))))
    return Measurement(program, tuple(map(tuple, units)), tuple(seats))


# ---------------------------------------------------------------- against the simulation


@dataclass(frozen=True)
class Measures:
    """Medians of measured steps, in milliseconds."""

    computes: dict[str, tuple[float, ...]]
    """Per op, its time in each stage, without waits (0 where a stage has none)."""
    comm: float
    """From a SEND to the end of the wait for it, where the other rank was waiting already; 0 if none did."""

    @property
    def split(self) -> bool:
        """Whether B and W were measured apart."""
        return "W" in self.computes


def measures(m: Measurement, steps: Sequence[Times]) -> Measures:
    """Costs of the actions, from every rank and microbatch of the steps."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    hops: list[float] = []
    for times in steps:
        for rank, seat in enumerate(m.seats):
            for whole in m.wholes[seat.coord]:
                found[whole.action.op, whole.action.subject.index or 0].append(_busy_ms(times[rank], whole))
        rank_, row, source, sent = m.receives
        waits = times[rank_, row]
        waiting = waits[:, UNTIL] - waits[:, WAITED] <= times[source, sent, BEGIN]
        hops += list(((waits[:, UNTIL] - times[source, sent, BEGIN])[waiting & (waits[:, WAITED] > 0)]) / 1e6)
    ops = sorted({op for op, _ in found})
    stages = range(len(m.program.stages))
    computes = {op: tuple(median(found[op, s]) if found.get((op, s)) else 0.0 for s in stages) for op in ops}
    return Measures(computes, max(0.0, float(median(hops))) if hops else 0.0)


def _busy_ms(rows: Times, whole: Whole) -> float:
    part = rows[list(whole.rows)]
    return float((part[:, END] - part[:, BEGIN] - part[:, WAITED]).sum()) / 1e6


def costs_of(typical: Measures) -> Costs:
    """The cost model of measured medians, in milliseconds; BW stands for itself where B and W were not split."""
    of, zero = typical.computes, (0.0,) * len(next(iter(typical.computes.values())))
    return Costs(
        F=of.get("F", zero), B=of.get("B", zero), W=of.get("W", zero), BW=of.get("BW"), R=of.get("R"), comm=typical.comm
    )


class Difference(NamedTuple):
    """Something that took longer or shorter than the simulation says. ms: how much."""

    ms: float
    text: str


def differences(m: Measurement, times: Times, typical: Measures, replica: int = 0, most: int = 5) -> list[Difference]:
    """The largest reasons why a measured step is not the simulated one, largest first.

    A compute action can take longer or shorter than the median of its kind and stage, it can begin later than
    the one before it was over, and its tensor can be on its way for longer than the simulation's latency. To
    wait for a tensor that was not sent yet is none: the simulation waits as well.
    """
    found = list(_late_tensors(m, times, typical, replica))
    for rank, seat in enumerate(m.seats):
        wholes = m.wholes[seat.coord] if seat.replica == replica else ()
        for whole in wholes:
            usual = typical.computes[whole.action.op][whole.action.subject.index or 0]
            took = _busy_ms(times[rank], whole)
            found.append(
                Difference(took - usual, f"rank {rank} {whole.action} took {took:.3f}, the median is {usual:.3f}")
            )
        for before, after in pairwise(sorted(row for whole in wholes for row in whole.rows)):
            found.append(_gap(m, times[rank], rank, before, after))
    return sorted(found, key=lambda d: -abs(d.ms))[:most]


def _late_tensors(m: Measurement, times: Times, typical: Measures, replica: int) -> Iterator[Difference]:
    for (rank, row), ns in zip(*m.transfers(times), strict=True):
        late = ns / 1e6 - typical.comm
        if late > 0 and m.seats[rank].replica == replica:
            action = m.program.ranks[m.seats[rank].coord][row]
            text = f"rank {rank} {action} waited {ns / 1e6:.3f} for a tensor on its way, simulated {typical.comm:.3f}"
            yield Difference(float(late), text)


def _gap(m: Measurement, rows: Times, rank: int, before: int, after: int) -> Difference:
    """The time between a rank's neighbouring compute actions, and the action that took most of it."""
    actions = m.program.ranks[m.seats[rank].coord]
    ms = float(rows[after, BEGIN] - rows[before, END]) / 1e6
    between = [(float(rows[i, END] - rows[i, BEGIN]) / 1e6, actions[i]) for i in range(before + 1, after)]
    longest, action = max(between, key=lambda one: one[0], default=(0.0, None))
    cause = f"{action} took {longest:.3f} of it" if action else "no action is between"
    return Difference(ms, f"rank {rank} between {actions[before]} and {actions[after]}: {cause}")


def rank_table(m: Measurement, times: Times, replica: int = 0) -> list[dict[str, Any]]:
    """Per rank of a pipeline, milliseconds of its time: busy, receive, transfer, and the rest of the step."""
    where, under_way = m.transfers(times)
    computes = m.computes
    ns = int(times[..., END][computes].max() - times[..., BEGIN][computes].min())
    out = []
    for rank, seat in enumerate(m.seats):
        if seat.replica != replica:
            continue
        rows = times[rank][computes[rank]]
        waited = int(rows[:, WAITED].sum())
        busy = int((rows[:, END] - rows[:, BEGIN]).sum()) - waited
        moving = int(under_way[where[:, 0] == rank].sum())
        parts = {"busy": busy, "receive": waited - moving, "transfer": moving, "rest": ns - busy - waited}
        out.append({"rank": rank, **{name: value / 1e6 for name, value in parts.items()}})
    return out
