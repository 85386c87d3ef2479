"""Peak memory of a program: a bound that holds whatever the timing. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..actions import Subject
from .facts import Boundary, Facts


@dataclass(frozen=True, kw_only=True)
class StageBytes:
    """Bytes of one microbatch in one stage."""

    input: int
    """The activation that comes in; its gradient is as large."""
    output: int
    """The activation that goes out; its gradient is as large."""
    held: int
    """What autograd keeps from F (or R, if there is one) to the backward, the input not counted."""
    deferred: int = 0
    """What is kept from B to W."""


Life = tuple[int, int, int, int]
"""Rank, first step, last step (both inclusive), bytes."""


def in_flight(facts: Facts) -> tuple[int, ...]:
    """Per rank, the most (stage, microbatch) pairs between the start of F and the end of the backward."""
    lives = [
        (span.rank, span.first, facts.backward(stage, m).last, 1)
        for (op, stage, m), span in facts.spans.items()
        if op == "F" and facts.has_backward
    ]
    return _highest(facts, lives)


def peak_bytes(facts: Facts, sizes: Sequence[StageBytes]) -> tuple[int, ...]:
    """Per rank, the most bytes of activations, activation gradients and deferred work at one time.

    A received tensor counts from the post of its RECV; a sent one until the rank hears from the
    receiver something that was sent after the tensor was used, since nothing else tells that the
    transfer is over. Parameters and optimizer state are not counted.
    """
    return _highest(facts, [*_tensor_lives(facts, sizes), *_sent_lives(facts, sizes)])


def _highest(facts: Facts, lives: Sequence[Life]) -> tuple[int, ...]:
    changes = [[0] * (len(row) + 1) for row in facts.program.ranks]
    for rank, first, last, size in lives:
        changes[rank][first] += size
        changes[rank][last + 1] -= size
    out = []
    for row in changes:
        level = top = 0
        for change in row:
            level += change
            top = max(top, level)
        out.append(top)
    return tuple(out)


def _tensor_lives(facts: Facts, sizes: Sequence[StageBytes]) -> Iterator[Life]:
    """Everything but what waits to be sent."""
    for (op, stage, m), span in facts.spans.items():
        size, rank = sizes[stage], span.rank
        if op == "F":
            end = facts.backward(stage, m).last if facts.has_backward else span.last
            yield rank, _arrival(facts, Subject("act", stage - 1), m, span.first), end, size.input
            again = facts.spans.get(("R", stage, m))
            if again:
                yield rank, again.first, end, size.held
            yield rank, span.first, span.last if again else end, size.held
            yield rank, span.first, span.last, size.output
        elif op in ("B", "BW"):
            yield rank, _arrival(facts, Subject("grad", stage + 1), m, span.first), span.last, size.output
            yield rank, span.first, span.last, size.input
        if op == "B":
            yield rank, span.first, facts.spans["W", stage, m].last, size.deferred


def _arrival(facts: Facts, subject: Subject, m: int, use: int) -> int:
    """Step from which a boundary tensor takes room at its user: the RECV, or the use if made on the same rank."""
    return facts.recvs[subject, m][1] if (subject, m) in facts.recvs else use


def _sent_lives(facts: Facts, sizes: Sequence[StageBytes]) -> Iterator[Life]:
    """Boundary tensors after they are made, until their transfer is known to be over or their user starts."""
    replies = _replies(facts)
    for (op, stage, m), span in facts.spans.items():
        if op == "F":
            subject, user, size = Subject("act", stage), facts.spans.get(("F", stage + 1, m)), sizes[stage].output
        elif op in ("B", "BW") and stage > 0:
            subject, user, size = Subject("grad", stage), facts.backward(stage - 1, m), sizes[stage].input
        else:
            continue
        if user is None:
            continue
        end = (
            user.first
            if user.rank == span.rank
            else _heard(facts, replies, (subject, m), span.rank, user.rank, user.first)
        )
        if end > span.last:
            yield span.rank, span.last + 1, end - 1 if user.rank == span.rank else end, size


def _replies(facts: Facts) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    """Per (source, destination): the steps of the sends, and the step at which each is used, both ascending."""
    pairs: dict[tuple[int, int], list[tuple[int, Boundary]]] = defaultdict(list)
    for boundary, (rank, step) in facts.sends.items():
        pairs[rank, facts.recvs[boundary][0]].append((step, boundary))
    out = {}
    for link, sends in pairs.items():
        sends.sort()
        uses, latest = [], len(facts.program.ranks[link[1]])
        for _, boundary in reversed(sends):  # a later message heard earlier tells as much
            latest = min(latest, _use(facts, boundary))
            uses.append(latest)
        out[link] = ([step for step, _ in sends], uses[::-1])
    return out


def _use(facts: Facts, boundary: Boundary) -> int:
    (kind, maker), m = boundary
    assert maker is not None
    return facts.spans["F", maker + 1, m].first if kind == "act" else facts.backward(maker - 1, m).first


def _heard(
    facts: Facts,
    replies: dict[tuple[int, int], tuple[list[int], list[int]]],
    boundary: Boundary,
    sender: int,
    receiver: int,
    used: int,
) -> int:
    """Last step of the sender at which its tensor may still be on the way."""
    steps, uses = replies.get((receiver, sender), ([], []))
    k = bisect_right(steps, used)
    end = len(facts.program.ranks[sender]) - 1
    return min(end, uses[k] - 1) if k < len(uses) else end
