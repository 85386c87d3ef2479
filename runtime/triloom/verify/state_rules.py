"""What must hold of the state actions: WEIGH, TIE, REDUCE, CLIP, STEP, UNSHARD, RESHARD."""

from __future__ import annotations

from itertools import pairwise

from ..actions import STATE, Action, Subject
from ..grid import Place
from ..passes import WEIGHT_GRADIENT, BucketInfo, check_layout, gathers_params
from ..passes.resident import NEEDS_PARAMS
from ..placement import Placement
from .facts import REPEATED, Facts, StateKey
from .refusal import at, refuse


def state_in_order(facts: Facts, placement: Placement | None) -> bool:
    """Refuse state actions that are missing, useless or out of order; False if the program has none.

    Per bucket, once a step or for each microbatch: (TIE if tied,) REDUCE after the last gradient; then CLIP,
    STEP, and UNSHARD if the placement (where it is given) shards what STEP updates and nothing else. WEIGH
    once, before the first backward of the last stage. CLIP on every rank or on none: all of them sum the
    norm. What the placement shards is used only between its UNSHARD and its RESHARD.
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
    for rank, buckets in enumerate(layout.buckets):
        for bucket in buckets:
            _check_residency(facts, rank, bucket, placement)
    if facts.has_backward or any(op not in REPEATED for _, op, _, _ in facts.state):
        _check_update(facts, placement)
    _check_no_others(facts)
    return True


def _check_update(facts: Facts, placement: Placement | None) -> None:
    assert facts.layout is not None
    clip = any(op == "CLIP" for _, op, _, _ in facts.state)
    _check_weigh(facts)
    for rank, buckets in enumerate(facts.layout.buckets):
        if clip:
            _need(facts, rank, "CLIP", Subject("all"))
        for bucket in buckets:
            _check_bucket(facts, rank, bucket, clip, placement)


def _check_weigh(facts: Facts) -> None:
    program, last = facts.program, len(facts.program.stages) - 1
    rank = program.stages[last]
    for (r, op, _, _), steps in facts.state.items():
        if op == "WEIGH" and r != rank:
            place = (r, steps[0])
            refuse(
                program, f"{at(program, place)}: the weights are known where the last stage is, rank {rank}", [place]
            )
    weigh = _need(facts, rank, "WEIGH", Subject("all"))
    if facts.has_backward:
        _check_chain(facts, rank, [weigh, min(facts.backward(last, m).first for m in range(program.microbatches))])


def _writes(facts: Facts, rank: int, bucket: BucketInfo) -> list[tuple[int, Action]]:
    """The actions that add to gradients of the bucket."""
    row, units = facts.program.ranks[rank], set(bucket.units)
    return [(s, a) for s, a in enumerate(row) if a.op in WEIGHT_GRADIENT and units.intersection(facts.units_of(a))]


def _check_bucket(facts: Facts, rank: int, bucket: BucketInfo, clip: bool, placement: Placement | None) -> None:
    program = facts.program
    grads, params = Subject("grads", bucket.index), Subject("params", bucket.index)
    writes = _writes(facts, rank, bucket)
    reached = {u for _, a in writes for u in facts.units_of(a)}
    lost = [u for u in bucket.units if u not in reached]
    if lost:
        refuse(program, f"bucket {bucket.index} of rank {rank} is reduced, but nothing adds gradients of units {lost}")
    reduced = _check_reduces(facts, rank, bucket, grads, writes)
    chain = [reduced]
    if clip:
        chain.append(_need(facts, rank, "CLIP", Subject("all")))
    chain.append(_need(facts, rank, "STEP", params))
    frees = facts.state.get((rank, "RESHARD", params, None))
    gathers = [] if frees else facts.state.get((rank, "UNSHARD", params, None), [])
    if placement is not None and gathers_params(placement, bucket):
        gathers = [_need(facts, rank, "UNSHARD", params)]
    elif placement is not None and gathers:
        why = f"{at(program, (rank, gathers[0]))}: placement {placement.name!r} leaves nothing to gather"
        refuse(program, why, [(rank, gathers[0])])
    _check_chain(facts, rank, chain + gathers[:1])


def _check_reduces(
    facts: Facts, rank: int, bucket: BucketInfo, grads: Subject, writes: list[tuple[int, Action]]
) -> int:
    """One reduction a step, or one for each microbatch folded before the next one writes; the last step of them."""
    each = any(r == rank and op == "REDUCE" and s == grads and m is not None for r, op, s, m in facts.state)
    last = 0
    for m in range(facts.program.microbatches) if each else (None,):
        steps = [s for s, a in writes if m is None or a.microbatch == m]
        chain = [max(steps)]
        if bucket.tied:
            chain.append(_need(facts, rank, "TIE", grads, m))
        chain.append(_need(facts, rank, "REDUCE", grads, m))
        if each:
            chain.append(_need(facts, rank, "RESHARD", grads, m))
            chain += [min(after)] if (after := [s for s, _ in writes if s > chain[0]]) else []
        _check_chain(facts, rank, chain)
        last = max(last, *chain[1:3])
    return last


def _check_residency(facts: Facts, rank: int, bucket: BucketInfo, placement: Placement | None) -> None:
    """What is sharded is whole when it is used. Without a placement the program itself says what is sharded."""
    row, units = facts.program.ranks[rank], set(bucket.units)
    for kind, ops in (("params", NEEDS_PARAMS), ("grads", WEIGHT_GRADIENT)):
        subject = Subject(kind, bucket.index)
        freed = any(op == "RESHARD" and r == rank and s == subject for r, op, s, _ in facts.state)
        made = any(op == "UNSHARD" and r == rank and s == subject for r, op, s, _ in facts.state)
        if placement is None:
            sharded = made and freed
        else:
            sharded = bucket.sharded(placement) if kind == "params" else placement.grads.sharded and not bucket.tied
        if not sharded:
            continue
        whole = False
        for step, a in enumerate(row):
            if a.op in ("UNSHARD", "RESHARD") and a.subject == subject:
                if whole == (a.op == "UNSHARD"):
                    why = f"{at(facts.program, (rank, step))}: {subject} is {'whole' if whole else 'sharded'} already"
                    refuse(facts.program, why, [(rank, step)])
                whole = not whole
            elif a.op in ops and units.intersection(facts.units_of(a)) and not whole:
                why = f"{at(facts.program, (rank, step))} uses {subject}, which is sharded there"
                refuse(facts.program, why, [(rank, step)])
        if whole:
            refuse(facts.program, f"{subject} of rank {rank} is whole at the end of the step: RESHARD is missing")


def _need(facts: Facts, rank: int, op: str, subject: Subject, microbatch: int | None = None) -> int:
    steps = facts.state.get((rank, op, subject, microbatch))
    if not steps:
        others: list[Place] = [(r, s[0]) for (r, o, _, _), s in facts.state.items() if o == op and s]
        which = "" if microbatch is None else f"@{microbatch}"
        refuse(facts.program, f"{op}:{subject}{which} is missing on rank {rank}", others)
    return steps[-1]


def _check_chain(facts: Facts, rank: int, steps: list[int]) -> None:
    for before, after in pairwise(steps):
        if before >= after:
            places = [(rank, after), (rank, before)]
            why = f"{at(facts.program, places[0])} must come after {at(facts.program, places[1])}"
            refuse(facts.program, why, places)


def _check_no_others(facts: Facts) -> None:
    """State actions about buckets the layout does not have, or ties where nothing is tied."""
    assert facts.layout is not None
    for key, steps in facts.state.items():
        if steps and (why := _useless(facts, key)):
            refuse(facts.program, f"{at(facts.program, (key[0], steps[0]))}: {why}", [(key[0], steps[0])])


def _useless(facts: Facts, key: StateKey) -> str:
    assert facts.layout is not None
    rank, op, subject, _ = key
    buckets = facts.layout.buckets[rank]
    if subject.index is None:
        return ""
    if subject.index >= len(buckets):
        return f"rank {rank} has {len(buckets)} buckets"
    return "nothing in it is tied" if op == "TIE" and not buckets[subject.index].tied else ""
