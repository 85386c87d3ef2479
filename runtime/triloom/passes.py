"""Passes: each adds one kind of action to a program. Pure functions from Program to Program.

schedule(stages, microbatches) -> add_communication -> add_state -> verify
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .actions import COMPUTE, Action, Program, Subject, replace_ranks, stage_of
from .errors import ConfigError, ProgramError
from .placement import Placement

Link = tuple[int, int]
"""Source and destination coordinate of a transfer."""

WEIGHT_GRADIENT = ("BW", "W")
"""The actions that add to weight gradients."""
INPUT_GRADIENT = ("BW", "B")
"""The actions that make the gradient of a stage's input."""


# ---------------------------------------------------------------- communication


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


# ---------------------------------------------------------------- state


@dataclass(frozen=True)
class BucketInfo:
    """What the passes know of one bucket of a coordinate's flat layout."""

    index: int
    """Number of the bucket on its coordinate: the k of REDUCE:grads.k."""
    units: tuple[int, ...]
    """Global numbers of the units whose backward adds to a gradient in the bucket."""
    tied: tuple[int, ...] = ()
    """Global numbers of the ties that have a member in the bucket."""


@dataclass(frozen=True)
class StateLayout:
    """Where units and buckets sit."""

    units: tuple[tuple[int, ...], ...]
    """units[s]: global numbers of the units of stage s, in forward order."""
    buckets: tuple[tuple[BucketInfo, ...], ...]
    """buckets[c]: the buckets of pipeline coordinate c, in index order."""

    def tied_coordinates(self) -> dict[int, tuple[int, ...]]:
        """The coordinates that take part in each tie, in order, by tie number."""
        out: dict[int, list[int]] = {}
        for coord, buckets in enumerate(self.buckets):
            for tie in sorted({t for b in buckets for t in b.tied}):
                out.setdefault(tie, []).append(coord)
        return {tie: tuple(coords) for tie, coords in sorted(out.items())}


def gathers_params(placement: Placement) -> bool:
    """Whether a rank's STEP updates only its own shard of the parameters, so that they must be gathered."""
    return placement.optimizer.sharded or placement.grads.sharded


def add_state(program: Program, layout: StateLayout, placement: Placement, *, clip: bool = True) -> Program:
    """Add the data-parallel part of the step; a program without backwards is returned as it is.

    WEIGH comes first on the coordinate of the last stage. The last weight-gradient action of each
    stage becomes one action per unit, last unit first, so that ``REDUCE:grads.k`` can be posted as
    soon as the units of bucket k are done (after the SEND of a gradient another coordinate waits
    for). Buckets with parameters tied across coordinates come after all of the coordinate's compute,
    TIE then REDUCE, in tie order: waiting there for the other coordinates holds nothing up. At the
    end CLIP (if ``clip``), and for each bucket STEP, with UNSHARD right after it if the placement
    shards what STEP updates: the gather of one bucket overlaps with the update of the next.
    """
    if not any(a.op in WEIGHT_GRADIENT for row in program.ranks for a in row):
        return program
    check_layout(program, layout)
    _check_tie_order(layout)
    weigher = program.stages[-1]

    def row(coord: int) -> list[Action]:
        head = [Action("WEIGH", Subject("all"))] if coord == weigher else []
        lowered = _lower_last_backwards(program.ranks[coord], layout)
        return head + _add_reduces(lowered, coord, layout) + _update(layout.buckets[coord], placement, clip)

    return replace_ranks(program, map(row, range(len(program.ranks))))


def check_layout(program: Program, layout: StateLayout) -> None:
    """Raise ProgramError unless the layout has a row per stage and coordinate and buckets hold own units."""
    counts = (len(layout.units), len(layout.buckets))
    if counts != (len(program.stages), len(program.ranks)):
        raise ProgramError(
            f"the layout has units of {counts[0]} stages and buckets of {counts[1]} coordinates, "
            f"program {program.name!r} has {len(program.stages)} and {len(program.ranks)}"
        )
    for coord, buckets in enumerate(layout.buckets):
        own = {u for s, units in enumerate(layout.units) if program.stages[s] == coord for u in units}
        for k, bucket in enumerate(buckets):
            if bucket.index != k or not bucket.units or not own.issuperset(bucket.units):
                raise ProgramError(
                    f"coordinate {coord} runs units {sorted(own)}; its bucket at place {k} has index {bucket.index} "
                    f"and units {bucket.units}: a bucket needs its place as index and units of its own coordinate"
                )


def _check_tie_order(layout: StateLayout) -> None:
    """Two coordinates must come to their common ties in the same order."""
    order = [[t for b in _by_tie(buckets) for t in sorted(b.tied)] for buckets in layout.buckets]
    for a in range(len(order)):
        for b in range(a):
            common = set(order[a]) & set(order[b])
            seen_a, seen_b = ([t for t in order[c] if t in common] for c in (a, b))
            if seen_a != seen_b:
                raise ProgramError(
                    f"coordinates {b} and {a} would sum their common ties in the orders {seen_b} and {seen_a}: "
                    "give tied parameters that share a bucket on one coordinate neighbouring tie numbers"
                )


def _by_tie(buckets: Sequence[BucketInfo]) -> list[BucketInfo]:
    return sorted((b for b in buckets if b.tied), key=lambda b: sorted(b.tied))


def _lower_last_backwards(row: Sequence[Action], layout: StateLayout) -> list[Action]:
    """The last BW (or W, where they are split) of each stage as one action per unit, last unit first."""
    last = {stage_of(a): i for i, a in enumerate(row) if a.op in WEIGHT_GRADIENT}
    out: list[Action] = []
    for i, a in enumerate(row):
        if a.op in WEIGHT_GRADIENT and last[stage_of(a)] == i:
            units = layout.units[stage_of(a)]
            out += [a._replace(subject=Subject("unit", u)) for u in reversed(units)]
        else:
            out.append(a)
    return out


def _add_reduces(row: Sequence[Action], coord: int, layout: StateLayout) -> list[Action]:
    """REDUCE (and TIE) of each bucket as early as its gradients are final and nobody has to wait."""
    shared = {tie for tie, coords in layout.tied_coordinates().items() if len(coords) > 1}
    buckets = layout.buckets[coord]
    late = [b for b in buckets if shared.intersection(b.tied)]
    finished = {a.subject.index: i for i, a in enumerate(row) if a.op in WEIGHT_GRADIENT and a.subject.kind == "unit"}
    ready: dict[int, list[BucketInfo]] = defaultdict(list)
    for b in buckets:
        if b not in late:
            ready[max(finished[u] for u in b.units)].append(b)
    out: list[Action] = []
    waiting: list[BucketInfo] = []
    for i, a in enumerate(row):
        if a.op in COMPUTE:
            out += _reduces(waiting)
            waiting = []
        out.append(a)
        waiting += ready[i]
    return out + _reduces(waiting) + _reduces(_by_tie(late))


def _reduces(buckets: Sequence[BucketInfo]) -> list[Action]:
    out = []
    for b in buckets:
        subject = Subject("grads", b.index)
        out += [Action("TIE", subject)] if b.tied else []
        out.append(Action("REDUCE", subject))
    return out


def _update(buckets: Sequence[BucketInfo], placement: Placement, clip: bool) -> list[Action]:
    out = [Action("CLIP", Subject("all"))] if clip else []
    for b in buckets:
        subject = Subject("params", b.index)
        out.append(Action("STEP", subject))
        out += [Action("UNSHARD", subject)] if gathers_params(placement) else []
    return out
