"""What must hold of the state actions: WEIGH, TIE, REDUCE, CLIP, STEP, UNSHARD."""

from __future__ import annotations

from itertools import pairwise

from ..actions import STATE, Subject
from ..grid import Place
from ..passes import WEIGHT_GRADIENT, BucketInfo, check_layout, gathers_params
from ..placement import Placement
from .facts import Facts
from .refusal import at, refuse


def state_in_order(facts: Facts, placement: Placement | None) -> bool:
    """Refuse state actions that are missing, useless or out of order; False if the program has none.

    Per bucket: (TIE if tied,) REDUCE after the last gradient, CLIP, STEP, and UNSHARD if the
    placement (where it is given) shards what STEP updates. WEIGH once, before the first backward of
    the last stage. CLIP on every rank or on none: all of them sum the norm.
    """
    program, layout = facts.program, facts.layout
    places = [(r, s) for r, row in enumerate(program.ranks) for s, a in enumerate(row) if a.op in STATE]
    if not places:
        return False
    if layout is None:
        refuse(
            program, f"{at(program, places[0])}: state actions are verified against a layout, none was given", places
        )
    check_layout(program, layout)
    clip = any(op == "CLIP" for _, op, _ in facts.state)
    _check_weigh(facts)
    for rank, buckets in enumerate(layout.buckets):
        if clip:
            _need(facts, rank, "CLIP", Subject("all"))
        ready = _last_gradients(facts, rank)
        for bucket in buckets:
            _check_bucket(facts, rank, bucket, ready, clip, placement)
    _check_no_others(facts)
    return True


def _check_weigh(facts: Facts) -> None:
    program, last = facts.program, len(facts.program.stages) - 1
    rank = program.stages[last]
    for r, op, subject in facts.state:
        if op == "WEIGH" and r != rank:
            place = (r, facts.state[r, op, subject])
            refuse(
                program, f"{at(program, place)}: the weights are known where the last stage is, rank {rank}", [place]
            )
    weigh = _need(facts, rank, "WEIGH", Subject("all"))
    if facts.has_backward:
        _check_chain(facts, rank, [weigh, min(facts.backward(last, m).first for m in range(program.microbatches))])


def _last_gradients(facts: Facts, rank: int) -> dict[int, int]:
    """The step that adds the last weight gradient of each unit of a rank."""
    out: dict[int, int] = {}
    for step, action in enumerate(facts.program.ranks[rank]):
        if action.op in WEIGHT_GRADIENT:
            out.update(dict.fromkeys(facts.units_of(action), step))
    return out


def _check_bucket(
    facts: Facts, rank: int, bucket: BucketInfo, ready: dict[int, int], clip: bool, placement: Placement | None
) -> None:
    program = facts.program
    grads, params = Subject("grads", bucket.index), Subject("params", bucket.index)
    lost = [u for u in bucket.units if u not in ready]
    if lost:
        refuse(program, f"bucket {bucket.index} of rank {rank} is reduced, but nothing adds gradients of units {lost}")
    chain = [max(ready[u] for u in bucket.units)]
    if bucket.tied:
        chain.append(_need(facts, rank, "TIE", grads))
    chain.append(_need(facts, rank, "REDUCE", grads))
    if clip:
        chain.append(_need(facts, rank, "CLIP", Subject("all")))
    chain.append(_need(facts, rank, "STEP", params))
    gather = facts.state.get((rank, "UNSHARD", params))
    if placement is not None:
        if gathers_params(placement):
            gather = _need(facts, rank, "UNSHARD", params)
        elif gather is not None:
            why = f"{at(program, (rank, gather))}: placement {placement.name!r} leaves nothing to gather"
            refuse(program, why, [(rank, gather)])
    _check_chain(facts, rank, chain + ([] if gather is None else [gather]))


def _need(facts: Facts, rank: int, op: str, subject: Subject) -> int:
    step = facts.state.get((rank, op, subject))
    if step is None:
        others: list[Place] = [(r, s) for (r, o, _), s in facts.state.items() if o == op]
        refuse(facts.program, f"{op}:{subject} is missing on rank {rank}", others)
    return step


def _check_chain(facts: Facts, rank: int, steps: list[int]) -> None:
    for before, after in pairwise(steps):
        if before >= after:
            places = [(rank, after), (rank, before)]
            why = f"{at(facts.program, places[0])} must come after {at(facts.program, places[1])}"
            refuse(facts.program, why, places)


def _check_no_others(facts: Facts) -> None:
    """State actions about buckets the layout does not have, or ties where nothing is tied."""
    assert facts.layout is not None
    for (rank, op, subject), step in facts.state.items():
        buckets = facts.layout.buckets[rank]
        tied = subject.index is not None and subject.index < len(buckets) and buckets[subject.index].tied
        if subject.index is not None and (subject.index >= len(buckets) or (op == "TIE" and not tied)):
            what = (
                f"rank {rank} has {len(buckets)} buckets" if subject.index >= len(buckets) else "nothing in it is tied"
            )
            refuse(facts.program, f"{at(facts.program, (rank, step))}: {what}", [(rank, step)])
