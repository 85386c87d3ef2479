"""The graph of who waits for whom, and the words for a cycle in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NoReturn

from ..grid import Place
from ..lanes import Lane
from .facts import Facts
from .refusal import at, refuse


@dataclass(frozen=True)
class Part:
    """A rank's side of a meeting: the place of its action, and the lane it was posted on."""

    place: Place
    lane: Lane


@dataclass
class Run:
    """Events are numbers: first the start of every action, then the completion of every meeting."""

    facts: Facts
    places: list[Place] = field(init=False)
    """Place of the action that event e starts; as many as there are actions."""
    starts: list[int] = field(init=False)
    """Event of the first action of each rank."""
    meetings: list[list[Part]] = field(default_factory=list)
    follows: list[list[int]] = field(init=False)
    """follows[e]: the events that wait for e."""

    def __post_init__(self) -> None:
        rows = self.facts.program.ranks
        self.places = [(rank, step) for rank, row in enumerate(rows) for step in range(len(row))]
        self.starts = [0]
        for row in rows:
            self.starts.append(self.starts[-1] + len(row))
        self.follows = [[] for _ in self.places]
        for e, (one, after) in enumerate(pairwise(self.places)):
            if one[0] == after[0]:
                self.follows[e].append(e + 1)

    def start(self, place: Place) -> int:
        return self.starts[place[0]] + place[1]

    def is_start(self, event: int) -> bool:
        return event < len(self.places)

    def meet(self) -> int:
        """A new meeting; its event."""
        self.meetings.append([])
        self.follows.append([])
        return len(self.follows) - 1

    def parts(self, meeting: int) -> list[Part]:
        return self.meetings[meeting - len(self.places)]

    def wait(self, before: int, after: int) -> None:
        self.follows[before].append(after)


def refuse_cycle(graph: Run, stuck: set[int]) -> NoReturn:
    """Name the actions that wait for each other among the events that never fire."""
    program = graph.facts.program
    blocked: list[Place] = []
    lines: list[str] = []
    marks: list[Place] = []
    cycle = _find_cycle(graph, stuck)
    side: Place | None = None  # the waiting rank's side of the meeting that the cycle has come to
    for one, other in pairwise((*cycle, *cycle, cycle[0])):
        if graph.is_start(one) and graph.is_start(other):
            continue
        if graph.is_start(one):
            here = graph.places[one]
            side = _part_of(graph, other, here[0]).place
            line = f"{at(program, here)} starts only after {at(program, side)} is over"
        elif graph.is_start(other):
            there = graph.places[other]
            line = f"{at(program, side)} waits for {at(program, there)}" if side else ""
            marks.append(there)
        else:
            queued, ahead = _same_lane(graph, one, other)
            line, side = f"{at(program, queued)} is queued behind {at(program, ahead)} on the same lane", ahead
            marks.append(queued)
        if side and side not in blocked:
            blocked.append(side)
        if line and line not in lines:
            lines.append(line)
    names = " and ".join(at(program, p) for p in blocked)
    waiting = f"{names} wait for each other" if len(blocked) > 1 else f"{names} waits for itself"
    refuse(program, f"deadlock, {waiting}:\n  " + "\n  ".join(lines), blocked + marks)


def _find_cycle(graph: Run, stuck: set[int]) -> Sequence[int]:
    """Events of which each waits for the next, and the last for the first."""
    waits_for: dict[int, list[int]] = defaultdict(list)
    for e in sorted(stuck):
        for after in graph.follows[e]:
            waits_for[after].append(e)
    seen: dict[int, int] = {}
    event = min(stuck)
    while event not in seen:  # a stuck event always waits for a stuck event
        seen[event] = len(seen)
        event = min(waits_for[event])
    return list(seen)[seen[event] :]


def _part_of(graph: Run, meeting: int, rank: int) -> Part:
    return next(p for p in graph.parts(meeting) if p.place[0] == rank)


def _same_lane(graph: Run, queued: int, ahead: int) -> tuple[Place, Place]:
    for q in graph.parts(queued):
        for a in graph.parts(ahead):
            if q.place[0] == a.place[0] and q.lane == a.lane and a.place <= q.place:
                return q.place, a.place
    raise AssertionError("meetings wait for each other only on a lane of one rank")
