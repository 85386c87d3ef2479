"""Parameters, gradients and optimizer state of one rank, in the flat layout, and the actions on them.

Handlers of TIE, REDUCE, STEP, UNSHARD and RESHARD. Which bytes live where is the placement's choice; which
numbers are added in which order is the same for all of them:

    gradient = sum over dp ranks, in rank order, of (sum over uses in unit order, of
               (sum over microbatches in order))

so all stages end in the same bits (stage 0 reduces by reduce_scatter and then gathers). With cadence
``microbatch`` the two inner sums change places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..actions import Action
from ..groups.base import Group
from ..native import Pool
from ..optim import Hyper, Optimizer, Rule, Treatment
from ..placement import Placement
from ..shards import ShardSpec
from . import ties as tied
from .bucket import BucketState, allocate, residency, settle_down
from .executor import Handler, StepState
from .flat import Bucket, Entry, Piece, Slot, layout, pieces
from .guard import guard
from .reduction import Exact, Reduction
from .segments import whole_states
from .ties import Tie
from .weight_grads import Accumulator


@dataclass(frozen=True, slots=True)
class LocalParam:
    """A trainable parameter use on this rank."""

    name: str
    unit: int
    param: torch.nn.Parameter
    spec: ShardSpec
    tie: Tie | None = None


class ShardedState:
    """The state of all units on one rank.

    params: every use of every trainable parameter, in unit order. dp: the data-parallel ranks the state is sharded
    over; replicas: those that hold the same shard (one, but for hybrid sharding); tp: group; tie_groups: by tie
    index, the group over the coordinates that hold the tie (absent when it is one coordinate). pool:
    threads for element-wise work on the host; reduction: how gradients are summed over dp.
    """

    def __init__(
        self,
        params: Sequence[LocalParam],
        *,
        dp: Group,
        replicas: Group,
        tp: Group,
        coord: int,
        tie_groups: Mapping[int, Group],
        placement: Placement,
        optimizer: Optimizer,
        device: torch.device,
        pool: Pool | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        self._dp, self._replicas, self._tp, self._coord = dp, replicas, tp, coord
        self._tie_groups = tie_groups
        self._placement = placement
        self._device = device
        self.pool = pool
        self._reduction = reduction or Exact()
        self._owned_runs: list[torch.Tensor] | None = None
        self.uses: dict[tuple[int, int], Accumulator] = {}
        """(unit, id(parameter)) -> its accumulator."""
        self.params: dict[str, LocalParam] = {}
        """By canonical name, in unit order; of tied uses the first on this rank."""
        for p in params:
            self.params.setdefault(p.name, p)
        self._treatments = {n: optimizer.treatment(n, p.spec.global_shape) for n, p in self.params.items()}
        self.buckets = tuple(
            self._allocate(b, params)
            for b in layout(self._entries(), bucket_numel=max(1, placement.bucket_bytes // 4), dp=dp.size)
        )
        self._of_unit: dict[int, list[BucketState]] = {}
        for p in params:
            state = next(b for b in self.buckets if p.name in b.uses)
            if state.residency.params and state not in self._of_unit.setdefault(p.unit, []):
                self._of_unit[p.unit].append(state)

    # -- building --------------------------------------------------------------------------------

    def _entries(self) -> list[Entry]:
        entries, rules, treatments = [], list[Rule](), list[Treatment]()
        for name, p in self.params.items():
            treatment = self._treatments[name]
            rule = treatment.rule
            if rule not in rules:
                rules.append(rule)
            if treatment not in treatments:
                treatments.append(treatment)
            dtype = str(p.param.dtype).removeprefix("torch.")
            shape, tie = tuple(p.param.shape), p.tie is not None
            number = treatments.index(treatment)
            entries.append(Entry(name, p.unit, shape, dtype, tie, rules.index(rule), rule.reach is None, number))
        return entries

    def _allocate(self, bucket: Bucket, params: Sequence[LocalParam]) -> BucketState:
        tied = any(self.params[s.name].tie is not None for s in bucket.slots)
        rows = residency(self._placement, tied=tied, dp=self._dp.size)
        state = allocate(
            bucket,
            rows,
            rank=self._dp.rank,
            dp=self._dp.size,
            treatments=self._treatments,
            device=self._device,
        )
        for slot in bucket.slots:
            self._adopt(state, slot, [p for p in params if p.name == slot.name])
        settle_down(state)
        return state

    def _adopt(self, state: BucketState, slot: Slot, uses: Sequence[LocalParam]) -> None:
        """Make the parameter a view of the flat buffer and give each use its accumulator."""
        view = state.params.tensor[slot.offset : slot.stop].view(slot.shape)
        view.copy_(uses[0].param.detach())
        grad = state.grads.tensor[slot.offset : slot.stop].view(slot.shape)
        for i, use in enumerate(uses):
            use.param.data = view
            if state.residency.params:
                guard(use.param, slot.name, lambda: state.params.whole)
            accumulator = Accumulator(slot.name, grad if i == 0 else torch.zeros_like(grad))
            self.uses[use.unit, id(use.param)] = accumulator
            state.uses.setdefault(slot.name, []).append(accumulator)

    # -- a step ----------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Handler]:
        return {
            "TIE": self._tie,
            "REDUCE": self._reduce,
            "STEP": self._step,
            "UNSHARD": self._unshard,
            "RESHARD": self._reshard,
        }

    def begin_step(self) -> None:
        """Gradients start anew: the first write of the step overwrites."""
        for state in self.buckets:
            state.refresh()
            state.folded = False

    def end_step(self) -> None:
        """Wait until every rank's parameters are as the placement keeps them."""
        for state in self.buckets:
            _finish_gather(state)

    def ready(self, unit: int) -> None:
        """Wait for the parameters that a unit is about to use."""
        for state in self._of_unit.get(unit, ()):
            _finish_gather(state)

    def _bucket(self, action: Action) -> BucketState:
        return self.buckets[action.subject.index or 0]

    def _tie(self, action: Action, step: StepState) -> None:
        state = self._bucket(action)
        ties = {p.tie.index: p.tie for s in state.bucket.slots if (p := self.params[s.name]).tie is not None}
        for index in sorted(ties):
            self._sum_tie(ties[index], state.uses[ties[index].names[0]])

    def _sum_tie(self, tie: Tie, uses: list[Accumulator]) -> None:
        counts = [tie.coords.count(c) for c in tie.members()]
        local = torch.stack([u.settle().reshape(-1) for u in uses])
        group = self._tie_groups.get(tie.index)
        if group is None:
            gathered = local.unsqueeze(0)
        else:
            padded = local.new_zeros(max(counts), local.shape[1])
            padded[: len(uses)] = local
            gathered = local.new_empty(group.size, *padded.shape)
            group.all_gather(gathered, padded).wait()
        seen = dict.fromkeys(tie.members(), 0)
        order = []
        for coord in tie.coords:
            order.append((tie.members().index(coord), seen[coord]))
            seen[coord] += 1
        tied.sum_uses(gathered, order, uses[0].out)

    def _reduce(self, action: Action, step: StepState) -> None:
        """Post the sum over dp of a bucket: into this rank's part of the whole gradient, which it may alias."""
        state = self._bucket(action)
        state.settle()
        self._sum_partial(state)
        state.reduced = True
        if self._dp.size > 1:
            grads = state.grads.tensor
            state.reduction = self._reduction.post(self._dp, grads[state.shard], grads, state.memory)

    def _sum_partial(self, state: BucketState) -> None:
        """Sum over tp the gradients of replicated parameters that saw only part of the sequence."""
        partial = [s for s in state.bucket.slots if self.params[s.name].spec.partial_grad]
        if not partial or self._tp.size == 1:
            return
        views = [state.grads.tensor[s.offset : s.stop] for s in partial]
        packed = torch.cat(views)
        self._tp.all_reduce(packed).wait()
        for view, part in zip(views, torch.split(packed, [v.numel() for v in views]), strict=True):
            view.copy_(part)

    def _reshard(self, action: Action, step: StepState) -> None:
        """Keep only this rank's part: of the parameters, or of a reduced gradient, which is added to those before."""
        state = self._bucket(action)
        if action.subject.kind == "params":
            _finish_gather(state)
            if state.residency.params:
                state.params.release()
            return
        self._finish_reduction(state)
        if state.residency.each or state.residency.grads:
            mine = state.grads.tensor[state.shard]
            if state.folded:
                state.grad_shard.add_(mine)
            else:
                state.grad_shard.copy_(mine)
            state.folded = True
            state.refresh()
        if state.residency.grads:
            state.grads.release()

    def _finish_reduction(self, state: BucketState) -> None:
        if state.reduction is not None:
            state.reduction.wait()
            state.reduction = None
        if state.reduced:
            state.reduced = False
            if self._replicas.size > 1:
                self._replicas.all_reduce(state.grads.tensor[state.shard]).wait()

    def wait_reduced(self) -> None:
        """Gradients are final: this rank's shards, or all of them where the update is not sharded."""
        for state in self.buckets:
            self._finish_reduction(state)
            if state.residency.optimizer:
                continue
            if self._dp.size > 1:
                self._dp.all_gather(state.grads.tensor, state.grad_shard).wait()
            elif state.residency.each:
                state.grads.tensor.copy_(state.grad_shard)

    def _step(self, action: Action, step: StepState) -> None:
        if step.skipped:
            return
        state = self._bucket(action)
        grads, low = state.final_grads, state.low
        for gap in state.padding:
            grads[gap].zero_()
        for s in state.segments:
            s.treatment.rule.update(
                state.master[s.span].view(s.shape),
                grads[s.span].view(s.shape),
                s.states,
                Hyper(
                    lr=s.treatment.rate(step.step),
                    step=step.step + 1,
                    weight_decay=s.treatment.weight_decay,
                    grad_scale=step.grad_scale,
                    pool=self.pool,
                ),
                None if low is None else low[s.span].view(s.shape),
            )

    def _unshard(self, action: Action, step: StepState) -> None:
        """Make room for a whole gradient, or post the gather of the parameters."""
        state = self._bucket(action)
        if action.subject.kind == "grads":
            grads = state.grads.provide()
            for gap in state.bucket.gaps:  # new memory holds anything, and a block of a reduction may reach into it
                grads[gap].zero_()
        elif self._dp.size > 1:
            state.gather = self._dp.all_gather(state.params.provide(), state.param_shard)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole parameters for reading and writing between steps; collective over dp.

        What is written is kept: by the rank that owns the part, so every rank must write the same.
        """
        everything = [s for s in self.buckets if s.residency.params]
        for state in everything:
            self._dp.all_gather(state.params.provide(), state.param_shard).wait()
        try:
            yield
        finally:
            for state in self.buckets:
                if state.residency.params:
                    state.param_shard.copy_(state.params.tensor[state.shard])
                    state.params.release()
                if state.low is not None:
                    state.master.copy_(state.low)

    # -- views for others ------------------------------------------------------------------------

    def owned_gradients(self) -> list[tuple[str, torch.Tensor]]:
        """The gradients this rank contributes to the global norm, by name and flat: its dp shard of every
        parameter it is the first holder of (over tp for replicated, over pp for tied parameters)."""
        return [
            (piece.slot.name, state.grad_shard[piece.start - state.shard.start : piece.stop - state.shard.start])
            for state, piece in self._owned_pieces()
        ]

    def owned_runs(self) -> list[torch.Tensor]:
        """The same gradients as few tensors: neighbours without padding between them are one."""
        if self._owned_runs is None:
            runs: list[tuple[BucketState, int, int]] = []
            for state, piece in self._owned_pieces():
                if runs and runs[-1][0] is state and runs[-1][2] == piece.start:
                    runs[-1] = (state, runs[-1][1], piece.stop)
                else:
                    runs.append((state, piece.start, piece.stop))
            self._owned_runs = [s.grad_shard[lo - s.shard.start : hi - s.shard.start] for s, lo, hi in runs]
        return self._owned_runs

    def _owned_pieces(self) -> Iterator[tuple[BucketState, Piece]]:
        if self._replicas.rank > 0:
            return
        for state in self.buckets:
            for piece in pieces(state.bucket, self._dp.rank, self._dp.size):
                p = self.params[piece.slot.name]
                replicated = p.spec.dim is None
                elsewhere = p.tie is not None and p.tie.coords[0] != self._coord
                if not elsewhere and not (replicated and self._tp.rank > 0):
                    yield state, piece

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Local (tp shard) tensors by name, whole over dp: ``params``, ``master`` or a state of the optimizer."""
        out: dict[str, torch.Tensor] = {}
        for state in self.buckets:
            if kind not in ("params", "master"):
                acc, sharded = state.grad_shard.dtype, state.residency.optimizer
                out |= whole_states(
                    state.bucket, state.states, kind, self._treatments, dp=self._dp, sharded=sharded, dtype=acc
                )
                continue
            flat = self._gathered(state, kind)
            for slot in state.bucket.slots:
                out[slot.name] = flat[slot.offset : slot.stop].view(slot.shape)
        return out

    def _gathered(self, state: BucketState, kind: str) -> torch.Tensor:
        if kind == "params" and state.params.whole:
            return state.params.tensor
        mine = state.param_shard if kind == "params" else state.master
        if mine.numel() == state.bucket.numel:
            return mine
        full = mine.new_empty(state.bucket.numel)
        self._dp.all_gather(full, mine.contiguous()).wait()
        return full


def _finish_gather(state: BucketState) -> None:
    if state.gather is not None:
        state.gather.wait()
        state.gather = None
