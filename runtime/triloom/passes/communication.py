"""Passes: each adds one kind of action to a program. Pure functions from Program to Program.

schedule(stages, microbatches) -> add_communication -> add_state -> verify
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from ..actions import Action, Program, Subject, replace_ranks, stage_of
from ..errors import ConfigError, ProgramError

Link = tuple[int, int]
"""Source and destination coordinate of a transfer."""

INPUT_GRADIENT = ("BW", "B")
"""The actions that make the gradient of a stage's input."""


def produced(program: Program, action: Action) -> tuple[Action, Action] | None:
    """The (SEND, RECV) pair for what a stage's compute action makes for another coordinate, if anything.

    F makes the activation for the stage after, B and BW the gradient for the stage before; stages
    that share a coordinate hand it over in memory.
    """
    if action.op == "F":
        kind, neighbour = "act", stage_of(action) + 1
    elif action.op in INPUT_GRADIENT:
        kind, neighbour = "grad", stage_of(action) - 1
    else:
        return None
    here = program.stages[stage_of(action)]
    if not 0 <= neighbour < len(program.stages) or program.stages[neighbour] == here:
        return None
    subject = Subject(kind, stage_of(action))
    there = program.stages[neighbour]
    return Action("SEND", subject, action.microbatch, there), Action("RECV", subject, action.microbatch, here)


def consumed_by(program: Program, action: Action) -> Subject | None:
    """The boundary tensor a stage's compute action receives from another coordinate, if any."""
    if action.op == "F":
        kind, maker = "act", stage_of(action) - 1
    elif action.op in INPUT_GRADIENT:
        kind, maker = "grad", stage_of(action) + 1
    else:
        return None
    if not 0 <= maker < len(program.stages) or program.stages[maker] == program.stages[stage_of(action)]:
        return None
    return Subject(kind, maker)


def add_communication(program: Program, early: int = 1) -> Program:
    """Add SEND right after each producer and RECV ``early`` compute actions before its consumer.

    Receives from one coordinate are posted in the order in which that coordinate sends (so some
    are posted earlier still): transfers between two coordinates match by order, whatever they
    carry. Stages that share a coordinate need no transfer.
    """
    if early < 0:
        raise ConfigError(f"receives are posted 0 or more compute actions before their use, got early={early}")
    _check_stage_compute_only(program)
    sent = _transfers_by_link(program)
    receives = _receive_slots(program, sent, early)

    def row(rank: int) -> Iterator[Action]:
        for slot, action in enumerate(program.ranks[rank]):
            yield from receives[rank, slot]
            yield action
            if pair := produced(program, action):
                yield pair[0]

    return replace_ranks(program, map(row, range(len(program.ranks))))


def _check_stage_compute_only(program: Program) -> None:
    for rank, actions in enumerate(program.ranks):
        for a in actions:
            if a.subject.kind != "stage":
                raise ProgramError(
                    f"add_communication takes stage compute actions only, rank {rank} has {a}: "
                    "run it on the schedule, before the other passes"
                )


def _transfers_by_link(program: Program) -> dict[Link, list[Action]]:
    """The RECVs of every (source, destination), in the order of the sends."""
    sent: dict[Link, list[Action]] = defaultdict(list)
    for rank, actions in enumerate(program.ranks):
        for a in actions:
            if pair := produced(program, a):
                send, recv = pair
                assert isinstance(send.peer, int)
                sent[rank, send.peer].append(recv)
    return sent


def _receive_slots(program: Program, sent: dict[Link, list[Action]], early: int) -> dict[Link, list[Action]]:
    """The RECVs to post before compute action ``slot`` of ``rank``, by (rank, slot)."""
    use: dict[tuple[Subject, int | None], int] = {}
    for actions in program.ranks:
        for slot, a in enumerate(actions):
            if subject := consumed_by(program, a):
                use[subject, a.microbatch] = slot
    slots: dict[Link, list[Action]] = defaultdict(list)
    for (_, destination), recvs in sent.items():
        latest = len(program.ranks[destination])
        placed: list[tuple[int, Action]] = []
        for recv in reversed(recvs):  # nothing may be posted after what is sent later
            where = use.get((recv.subject, recv.microbatch))
            if where is None:
                raise ProgramError(f"{program.name}: nothing on rank {destination} uses {recv}")
            latest = min(latest, max(0, where - early))
            placed.append((latest, recv))
        for slot, recv in reversed(placed):
            slots[destination, slot].append(recv)
    return slots
