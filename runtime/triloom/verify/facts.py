"""The index of a program: where everything happens. Building it checks each action by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from ..actions import COMPUTE, STATE, TRANSFER, Action, Program, Subject
from ..grid import Place
from ..passes import StateLayout
from .refusal import at, refuse

SUBJECTS = {
    **dict.fromkeys(COMPUTE, ("stage", "unit")),
    **dict.fromkeys(TRANSFER, ("act", "grad")),
    **dict.fromkeys(("TIE", "REDUCE"), ("grads",)),
    **dict.fromkeys(("UNSHARD", "RESHARD"), ("params", "grads")),
    "STEP": ("params",),
    **dict.fromkeys(("WEIGH", "CLIP"), ("all",)),
}
"""What each operation may be about. An operation without a row has no rule, and is refused."""

Whole = tuple[str, int, int]
"""Operation, stage and microbatch of a compute action, whole or made of unit actions."""
StateKey = tuple[int, str, Subject, int | None]
"""Rank, operation, subject and microbatch (None: once a step) of a state action."""
REPEATED = ("UNSHARD", "RESHARD")
"""State actions that may come several times."""
Boundary = tuple[Subject, int]
"""A boundary tensor: activation or gradient, and its microbatch."""


@dataclass(frozen=True)
class Span:
    """The steps over which a rank runs one compute action of a stage; first == last unless cut into units."""

    rank: int
    first: int
    last: int


@dataclass
class Facts:
    """Filled by :func:`read`; read-only afterwards."""

    program: Program
    layout: StateLayout | None
    spans: dict[Whole, Span] = field(default_factory=dict)
    sends: dict[Boundary, Place] = field(default_factory=dict)
    recvs: dict[Boundary, Place] = field(default_factory=dict)
    state: dict[StateKey, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Steps of a state action by (rank, op, subject, microbatch), ascending."""
    unit_parts: dict[Whole, list[tuple[int, Place]]] = field(default_factory=lambda: defaultdict(list))
    """The unit actions of a stage's compute action, in program order."""

    @cached_property
    def has_backward(self) -> bool:
        return any(op != "F" for op, _, _ in self.spans)

    def backward(self, stage: int, microbatch: int) -> Span:
        """The action that makes the input gradient; exists once coverage has been proven."""
        return self.spans.get(("BW", stage, microbatch)) or self.spans["B", stage, microbatch]

    def units_of(self, action: Action) -> tuple[int, ...]:
        """Units a compute action works on; a stage without a layout counts as one unit."""
        index = action.subject.index or 0
        if action.subject.kind == "unit" or self.layout is None:
            return (index,)
        return self.layout.units[index]


def read(program: Program, layout: StateLayout | None) -> Facts:
    """Index a program; refuses malformed, misplaced and repeated actions."""
    facts = Facts(program, layout)
    stage_of_unit = {u: s for s, units in enumerate(layout.units) for u in units} if layout else {}
    for rank, row in enumerate(program.ranks):
        for step, action in enumerate(row):
            _check_form(facts, (rank, step), action)
            _READERS[action.op](facts, (rank, step), action, stage_of_unit)
    for whole, parts in facts.unit_parts.items():
        _join_units(facts, whole, parts)
    return facts


def _check_form(facts: Facts, place: Place, action: Action) -> None:
    program = facts.program
    kinds = SUBJECTS.get(action.op)
    if kinds is None:
        refuse(program, f"{at(program, place)}: verify has no rule for {action.op}", [place])
    if action.subject.kind not in kinds:
        refuse(program, f"{at(program, place)}: {action.op} is about {' or '.join(kinds)}", [place])
    if (action.subject.index is None) != (action.subject.kind == "all"):
        refuse(
            program,
            f"{at(program, place)}: the subject needs {'a' if action.subject.index is None else 'no'} number",
            [place],
        )
    if action.op in STATE and action.microbatch is None:
        return
    if action.op in STATE and action.subject.kind != "grads":
        refuse(program, f"{at(program, place)}: {action.op} of {action.subject.kind} has no microbatch", [place])
    if action.microbatch is None or not 0 <= action.microbatch < program.microbatches:
        refuse(program, f"{at(program, place)}: microbatches are 0 to {program.microbatches - 1}", [place])


def _read_compute(facts: Facts, place: Place, action: Action, stage_of_unit: dict[int, int]) -> None:
    program, (rank, step) = facts.program, place
    assert action.subject.index is not None and action.microbatch is not None  # by _check_form
    number = action.subject.index
    if action.subject.kind == "unit":
        if number not in stage_of_unit:
            why = "there is no layout that says" if facts.layout is None else "the layout does not say"
            refuse(program, f"{at(program, place)}: {why} which stage unit {number} belongs to", [place])
        number = stage_of_unit[number]
    if not 0 <= number < len(program.stages):
        refuse(program, f"{at(program, place)}: stages are 0 to {len(program.stages) - 1}", [place])
    if program.stages[number] != rank:
        refuse(program, f"{at(program, place)}: stage {number} runs on rank {program.stages[number]}", [place])
    whole = (action.op, number, action.microbatch)
    if action.subject.kind == "unit":
        facts.unit_parts[whole].append((action.subject.index, place))
        return
    if whole in facts.spans:
        first = (rank, facts.spans[whole].first)
        refuse(program, f"{at(program, place)} repeats step {first[1]}", [first, place])
    facts.spans[whole] = Span(rank, step, step)


def _read_transfer(facts: Facts, place: Place, action: Action, stage_of_unit: dict[int, int]) -> None:
    program, rank = facts.program, place[0]
    assert action.subject.index is not None and action.microbatch is not None  # by _check_form
    maker = action.subject.index
    user = maker + 1 if action.subject.kind == "act" else maker - 1
    if not (0 <= maker < len(program.stages) and 0 <= user < len(program.stages)):
        refuse(program, f"{at(program, place)}: no two of the {len(program.stages)} stages exchange this", [place])
    source, destination = program.stages[maker], program.stages[user]
    here, there = (source, destination) if action.op == "SEND" else (destination, source)
    if source == destination:
        refuse(program, f"{at(program, place)}: stages {maker} and {user} share rank {source}", [place])
    if (rank, action.peer) != (here, there):
        refuse(program, f"{at(program, place)}: belongs on rank {here}, with rank {there} as peer", [place])
    index = facts.sends if action.op == "SEND" else facts.recvs
    before = index.setdefault((action.subject, action.microbatch), place)
    if before != place:
        refuse(program, f"{at(program, place)} repeats step {before[1]}", [before, place])


def _read_state(facts: Facts, place: Place, action: Action, stage_of_unit: dict[int, int]) -> None:
    rank, step = place
    before = facts.state[rank, action.op, action.subject, action.microbatch]
    if before and action.op not in REPEATED:
        refuse(facts.program, f"{at(facts.program, place)} repeats step {before[0]}", [(rank, before[0]), place])
    before.append(step)


_READERS: dict[str, Callable[[Facts, Place, Action, dict[int, int]], None]] = {
    **dict.fromkeys(COMPUTE, _read_compute),
    **dict.fromkeys(TRANSFER, _read_transfer),
    **dict.fromkeys(STATE, _read_state),
}


def _join_units(facts: Facts, whole: Whole, parts: list[tuple[int, Place]]) -> None:
    """Unit actions count as the stage's action if every unit is there once and in order."""
    program, (op, stage, microbatch) = facts.program, whole
    marks = [place for _, place in parts]
    if whole in facts.spans:
        marks.append((program.stages[stage], facts.spans[whole].first))
        refuse(program, f"{op} of stage {stage}, microbatch {microbatch} runs whole and by unit", marks)
    assert facts.layout is not None  # or _read_compute had refused the units
    forward = facts.layout.units[stage]
    want = forward if op == "F" else forward[::-1]
    got = tuple(u for u, _ in parts)
    free = op in ("W", "R")
    if (sorted(got) if free else list(got)) != (sorted(want) if free else list(want)):
        refuse(
            program,
            f"{op} of stage {stage}, microbatch {microbatch} runs units {list(got)}, it needs {list(want)}",
            marks,
        )
    facts.spans[whole] = Span(program.stages[stage], marks[0][1], marks[-1][1])
