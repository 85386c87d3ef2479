"""What must hold of computes and transfers, whatever the timing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import NoReturn

from ..actions import Action, Subject
from ..grid import Place
from ..passes import WEIGHT_GRADIENT
from .facts import Boundary, Facts, Span
from .refusal import at, refuse


def covers_every_microbatch(facts: Facts) -> None:
    """Each F once, and (if there is any backward) BW once or B and W once, per stage and microbatch."""
    backward = facts.has_backward
    for stage, rank in enumerate(facts.program.stages):
        for m in range(facts.program.microbatches):
            ops = tuple(op for op in ("F", "BW", "B", "W") if (op, stage, m) in facts.spans)
            wanted = (("F", "BW"), ("F", "B", "W")) if backward else (("F",),)
            if ops not in wanted:
                need = " or ".join(" ".join(w) for w in wanted)
                marks = [(rank, facts.spans[op, stage, m].first) for op in ops]
                refuse(
                    facts.program,
                    f"stage {stage} (rank {rank}) has {' '.join(ops) or 'nothing'} for microbatch {m}, it needs {need}",
                    marks,
                )


def computes_in_order(facts: Facts) -> None:
    """On a rank: R after F, the backward after both, W after B, and what stages of one rank hand over."""
    for (op, stage, m), span in facts.spans.items():
        _recomputed_first(facts, op, stage, m)
        for before in _predecessors(facts, op, stage, m):
            if before.last >= span.first:
                late, early = (span.rank, span.first), (span.rank, before.last)
                why = f"{at(facts.program, late)} comes before {at(facts.program, early)}, which it needs"
                refuse(facts.program, why, [late, early])


def _recomputed_first(facts: Facts, op: str, stage: int, m: int) -> None:
    """Of actions cut into units, each unit's R comes before its backward."""
    if op not in ("B", "BW"):
        return
    recomputed = dict(facts.unit_parts.get(("R", stage, m), ()))
    for unit, place in facts.unit_parts.get((op, stage, m), ()):
        if unit in recomputed and recomputed[unit] > place:
            why = f"{at(facts.program, place)} comes before {at(facts.program, recomputed[unit])}, which it needs"
            refuse(facts.program, why, [place, recomputed[unit]])


def _predecessors(facts: Facts, op: str, stage: int, m: int) -> list[Span]:
    stages = facts.program.stages
    if op == "F":
        return [facts.spans["F", stage - 1, m]] if stage > 0 and stages[stage - 1] == stages[stage] else []
    if op == "W":
        return [facts.spans["B", stage, m]]
    out = [facts.spans["F", stage, m]]
    if op != "R":
        interleaved = ("R", stage, m) in facts.unit_parts and (op, stage, m) in facts.unit_parts
        out += [facts.spans["R", stage, m]] if ("R", stage, m) in facts.spans and not interleaved else []
        if stage + 1 < len(stages) and stages[stage + 1] == stages[stage]:
            out.append(facts.backward(stage + 1, m))
    return out


def transfers_are_complete(facts: Facts) -> None:
    """Each boundary tensor is sent after it is made and received before it is used, once."""
    for boundary, maker, user in _boundaries(facts):
        send, recv = facts.sends.get(boundary), facts.recvs.get(boundary)
        if send is None or recv is None:
            _refuse_missing(facts, boundary, maker, user)
        made, used = (maker.rank, maker.last), (user.rank, user.first)
        if send[1] < made[1]:
            why = f"{at(facts.program, send)} comes before {at(facts.program, made)}, which makes what it sends"
            refuse(facts.program, why, [send, made])
        if recv[1] > used[1]:
            why = f"{at(facts.program, used)} comes before {at(facts.program, recv)}, which brings what it uses"
            refuse(facts.program, why, [used, recv])
    wanted = {boundary for boundary, _, _ in _boundaries(facts)}
    for index in (facts.sends, facts.recvs):
        for boundary, place in index.items():
            if boundary not in wanted:
                refuse(facts.program, f"{at(facts.program, place)}: nothing in the program makes or uses it", [place])


def _boundaries(facts: Facts) -> list[tuple[Boundary, Span, Span]]:
    """Every tensor that must move between ranks, with what makes and what uses it."""
    stages, out = facts.program.stages, []
    for s in range(len(stages) - 1):
        if stages[s] == stages[s + 1]:
            continue
        for m in range(facts.program.microbatches):
            out.append(((Subject("act", s), m), facts.spans["F", s, m], facts.spans["F", s + 1, m]))
            if facts.has_backward:
                out.append(((Subject("grad", s + 1), m), facts.backward(s + 1, m), facts.backward(s, m)))
    return out


def _refuse_missing(facts: Facts, boundary: Boundary, maker: Span, user: Span) -> NoReturn:
    subject, m = boundary
    ends = [
        (facts.sends.get(boundary), Action("SEND", subject, m, user.rank), (maker.rank, maker.last), "made"),
        (facts.recvs.get(boundary), Action("RECV", subject, m, maker.rank), (user.rank, user.first), "used"),
    ]
    missing = [(action, place, verb) for there, action, place, verb in ends if there is None]
    why = "; ".join(f"{a} is missing on rank {p[0]}, where it is {v} by {at(facts.program, p)}" for a, p, v in missing)
    refuse(facts.program, why, [p for _, p, _ in missing] + [there for there, *_ in ends if there])


def links_are_in_order(facts: Facts) -> None:
    """Per source and destination the k-th RECV names what the k-th SEND sends: transfers match by order."""
    sent, received = _by_link(facts, facts.sends, "SEND"), _by_link(facts, facts.recvs, "RECV")
    for (source, destination), sends in sent.items():
        for k, (s, r) in enumerate(zip(sorted(sends), sorted(received[source, destination]), strict=True)):
            if s[1] != r[1]:
                send, recv = (source, s[0]), (destination, r[0])
                why = (
                    f"transfer {k} from rank {source} to rank {destination} is sent by "
                    f"{at(facts.program, send)} but received by {at(facts.program, recv)}"
                )
                refuse(facts.program, why, [send, recv])


def _by_link(facts: Facts, index: dict[Boundary, Place], op: str) -> dict[Place, list[tuple[int, Boundary]]]:
    out: dict[Place, list[tuple[int, Boundary]]] = defaultdict(list)
    for boundary, (rank, step) in index.items():
        peer = facts.program.ranks[rank][step].peer
        assert isinstance(peer, int)  # by _read_transfer
        out[(rank, peer) if op == "SEND" else (peer, rank)].append((step, boundary))
    return out


def gradients_add_in_order(facts: Facts) -> None:
    """Weight gradients of a unit are added in microbatch order: the bits of a sum depend on it."""
    for rank, row in enumerate(facts.program.ranks):
        added: dict[int, int] = {}
        for step, action in enumerate(row):
            if action.op not in WEIGHT_GRADIENT:
                continue
            for unit in facts.units_of(action):
                before = added.get(unit)
                earlier = None if before is None else row[before].microbatch
                if before is not None and earlier is not None and (action.microbatch or 0) < earlier:
                    places = [(rank, before), (rank, step)]
                    first, second = (at(facts.program, p) for p in places)
                    refuse(facts.program, f"{second} adds to weight gradients after {first}: not in order", places)
                added[unit] = step


RULES: tuple[tuple[str, Callable[[Facts], None]], ...] = (
    ("each stage computes each microbatch exactly once, forward and backward", covers_every_microbatch),
    ("nothing is used before it is made on the same rank", computes_in_order),
    ("each boundary tensor is sent once after it is made and received once before it is used", transfers_are_complete),
    ("sends and receives between two ranks match in order", links_are_in_order),
    ("weight gradients are added in microbatch order", gradients_add_in_order),
)
"""What is proven, and by which function; each needs the ones before it."""
