"""The pass that adds the data-parallel part of the step: reductions, norm, update, gathers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..actions import COMPUTE, Action, Program, Subject, replace_ranks
from ..placement import Placement
from .layout import BucketInfo, StateLayout, by_tie, check_layout, check_tie_order
from .lowering import WEIGHT_GRADIENT, last_weight_gradients, lower
from .resident import add_residency


def gathers_params(placement: Placement, bucket: BucketInfo) -> bool:
    """Whether STEP updates only a shard of parameters that are otherwise whole, so that they must be gathered."""
    return placement.optimizer.sharded and not bucket.sharded(placement)


def add_state(program: Program, layout: StateLayout, placement: Placement, *, clip: bool = True) -> Program:
    """Add the data-parallel part of the step. Which actions, the table's columns say:

    - WEIGH first, on the coordinate of the last stage.
    - ``REDUCE:grads.k`` as soon as the units of bucket k are done (after the SEND of a gradient another
      coordinate waits for): at the end of the step, or with cadence ``microbatch`` for each of them, and
      then ``RESHARD:grads.k@m`` where the result is folded into the shard. With sharded gradients
      ``UNSHARD:grads.k`` makes room before the first of them and RESHARD frees it.
    - Buckets with tied parameters are reduced once, at the end, TIE then REDUCE; those tied across
      coordinates after all of the coordinate's compute, in tie order: waiting there holds nothing up.
    - CLIP (if ``clip``), and for each bucket STEP, with ``UNSHARD:params.k`` after it if the update is
      sharded and the parameters are not: the gather of one bucket overlaps with the update of the next.
    - With sharded parameters UNSHARD and RESHARD around their uses (see resident.py), also in a program
      without backwards, which gets nothing else.
    """
    training = any(a.op in WEIGHT_GRADIENT for row in program.ranks for a in row)
    if not training and not placement.params.sharded:
        return program
    check_layout(program, layout)
    check_tie_order(layout)

    def row(coord: int) -> list[Action]:
        actions = _lowered(program.ranks[coord], layout, placement)
        if training:
            actions = _Reductions(coord, layout, placement).add(actions)
        if placement.params.sharded:
            actions = add_residency(actions, coord, layout, prefetch=placement.prefetch, keep=placement.keep)
        if not training:
            return actions
        weigh = [Action("WEIGH", Subject("all"))] if coord == program.stages[-1] else []
        return weigh + actions + _update(layout.buckets[coord], placement, clip)

    return replace_ranks(program, map(row, range(len(program.ranks))))


def _lowered(row: Sequence[Action], layout: StateLayout, placement: Placement) -> list[Action]:
    """Cut into units what state actions go in between, and every R."""
    last = last_weight_gradients(row)
    every = {"R"}
    if placement.params.sharded:
        every |= {"F", "B", "BW"}
    if placement.cadence == "microbatch":
        every |= set(WEIGHT_GRADIENT)
    return lower(row, layout, lambda i, a: i in last or a.op in every)


class _Reductions:
    """Places REDUCE, TIE and what belongs to them on one coordinate."""

    def __init__(self, coord: int, layout: StateLayout, placement: Placement) -> None:
        self.coord, self.layout, self.placement = coord, layout, placement
        shared = {tie for tie, coords in layout.tied_coordinates().items() if len(coords) > 1}
        self.late = [b for b in layout.buckets[coord] if shared.intersection(b.tied)]
        self.out: list[Action] = []
        self.ready: list[Action] = []
        """REDUCEs to post before the next compute."""
        self.unfolded: dict[int, int | None] = {}
        """Buckets reduced but not folded, with their microbatch."""
        self.whole: set[int] = set()
        """Sharded buckets that have room for a whole gradient now."""

    def add(self, row: Sequence[Action]) -> list[Action]:
        last = self._last_writes(row)
        for i, a in enumerate(row):
            if a.op in COMPUTE:
                self._post()
            if a.op in WEIGHT_GRADIENT:
                self._make_room(a)
            self.out.append(a)
            for b in last[i]:
                self._reduce(b, a.microbatch)
        self._post()
        for bucket in list(self.unfolded):
            self._fold(bucket)
        for b in by_tie(self.late):
            self.out += [_grads("TIE", b.index, None), _grads("REDUCE", b.index, None)]
        return self.out

    def _last_writes(self, row: Sequence[Action]) -> dict[int, list[BucketInfo]]:
        """Buckets whose gradient is final, of the step or of a microbatch, after each action."""
        final: dict[tuple[int, int | None], int] = {}
        for i, a in enumerate(row):
            if a.op in WEIGHT_GRADIENT:
                for b in self.layout.touched(self.coord, a):
                    final[b.index, a.microbatch if self._each(b) else None] = i
        out: dict[int, list[BucketInfo]] = defaultdict(list)
        for (index, _), i in final.items():
            if self.layout.buckets[self.coord][index] not in self.late:
                out[i].append(self.layout.buckets[self.coord][index])
        for buckets in out.values():
            buckets.sort(key=lambda b: b.index)
        return out

    def _each(self, b: BucketInfo) -> bool:
        """Reduced after every microbatch. Tied buckets are not: their uses would meet every time."""
        return self.placement.cadence == "microbatch" and not b.tied

    def _sharded(self, b: BucketInfo) -> bool:
        return self.placement.grads.sharded and not b.tied

    def _make_room(self, action: Action) -> None:
        for b in self.layout.touched(self.coord, action):
            if b.index in self.unfolded:
                self._fold(b.index)
            if self._sharded(b) and b.index not in self.whole:
                self.whole.add(b.index)
                self.out.append(_grads("UNSHARD", b.index, action.microbatch if self._each(b) else None))

    def _reduce(self, b: BucketInfo, microbatch: int | None) -> None:
        m = microbatch if self._each(b) else None
        self.ready += [_grads("TIE", b.index, m)] if b.tied else []
        self.ready.append(_grads("REDUCE", b.index, m))

    def _post(self) -> None:
        """Post what is ready. Sharded buckets posted before the last compute are freed now, others when they must."""
        for earlier in [k for k in self.unfolded if self._sharded(self.layout.buckets[self.coord][k])]:
            self._fold(earlier)
        for reduce in self.ready:
            self.out.append(reduce)
            b = self.layout.buckets[self.coord][reduce.subject.index or 0]
            if reduce.op == "REDUCE" and (self._each(b) or self._sharded(b)):
                self.unfolded[b.index] = reduce.microbatch
        self.ready = []

    def _fold(self, bucket: int) -> None:
        self.whole.discard(bucket)
        self.out.append(_grads("RESHARD", bucket, self.unfolded.pop(bucket)))


def _grads(op: str, bucket: int, microbatch: int | None) -> Action:
    return Action(op, Subject("grads", bucket), microbatch)


def _update(buckets: Sequence[BucketInfo], placement: Placement, clip: bool) -> list[Action]:
    out = [Action("CLIP", Subject("all"))] if clip else []
    for b in buckets:
        subject = Subject("params", b.index)
        out.append(Action("STEP", subject))
        out += [Action("UNSHARD", subject)] if gathers_params(placement, b) else []
    return out
