"""Parameters, gradients and optimizer state of one rank, in the flat layout, and the actions on them.

Handlers of TIE, REDUCE, STEP and UNSHARD. Which bytes live where is the placement's choice; which
numbers are added in which order is the same for all of them:

    gradient = sum over dp ranks, in rank order, of (sum over uses in unit order, of
               (sum over microbatches in order))

so stages 0 and 1 end in the same bits (stage 0 reduces by reduce_scatter and then gathers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..actions import Action
from ..groups.base import Group, Work
from ..native import Pool
from ..optim import Hyper, Optimizer
from ..placement import Placement
from ..shards import ShardSpec
from . import ties as tied
from .executor import Handler, StepState
from .flat import Bucket, Entry, Slot, layout, pieces
from .ties import Tie
from .weight_grads import Accumulator

ACCUMULATE = {torch.float64: torch.float64}
"""Dtype of gradients, masters and moments by parameter dtype; fp32 where not listed."""


@dataclass(frozen=True, slots=True)
class LocalParam:
    """A trainable parameter use on this rank."""

    name: str
    unit: int
    param: torch.nn.Parameter
    spec: ShardSpec
    tie: Tie | None = None


@dataclass(slots=True)
class BucketState:
    """The tensors of one bucket. All flat; ``update_*`` are what this rank's STEP updates."""

    bucket: Bucket
    params: torch.Tensor
    grads: torch.Tensor
    shard: slice
    """This dp rank's part of the bucket."""
    updates: slice
    """What STEP updates here: the shard, or the whole bucket."""
    master: torch.Tensor
    """Parameters in accumulation precision over ``updates``; a view of params where the dtypes agree."""
    states: dict[str, torch.Tensor]
    segments: list[tuple[slice, bool]]
    """Runs of equal decay inside ``updates``, relative to its start."""
    uses: dict[str, list[Accumulator]] = field(default_factory=dict)
    """Accumulators by slot name, in unit order; the first writes straight into grads."""
    gather: Work | None = None
    reduction: Work | None = None


class ShardedState:
    """The state of all units on one rank.

    params: every use of every trainable parameter, in unit order. dp, tp: groups; tie_groups: by tie
    index, the group over the coordinates that hold the tie (absent when it is one coordinate). pool:
    threads for element-wise work on the host.
    """

    def __init__(
        self,
        params: Sequence[LocalParam],
        *,
        dp: Group,
        tp: Group,
        coord: int,
        tie_groups: Mapping[int, Group],
        placement: Placement,
        optimizer: Optimizer,
        device: torch.device,
        pool: Pool | None = None,
    ) -> None:
        self._dp, self._tp, self._coord = dp, tp, coord
        self._tie_groups = tie_groups
        self._placement = placement
        self._optimizer = optimizer
        self._device = device
        self.pool = pool
        self.uses: dict[tuple[int, int], Accumulator] = {}
        """(unit, id(parameter)) -> its accumulator."""
        self.params: dict[str, LocalParam] = {}
        """By canonical name, in unit order; of tied uses the first on this rank."""
        for p in params:
            self.params.setdefault(p.name, p)
        entries = self._entries(params)
        bucket_numel = max(1, placement.bucket_bytes // 4)
        self.buckets = tuple(self._allocate(b, params) for b in layout(entries, bucket_numel=bucket_numel, dp=dp.size))

    # -- building --------------------------------------------------------------------------------

    def _entries(self, params: Sequence[LocalParam]) -> list[Entry]:
        seen: set[str] = set()
        entries = []
        for p in params:
            if p.name not in seen:
                seen.add(p.name)
                dtype = str(p.param.dtype).removeprefix("torch.")
                entries.append(Entry(p.name, p.unit, tuple(p.param.shape), dtype))
        return entries

    def _allocate(self, bucket: Bucket, params: Sequence[LocalParam]) -> BucketState:
        dtype: torch.dtype = getattr(torch, bucket.dtype)
        acc = ACCUMULATE.get(dtype, torch.float32)
        lo, hi = bucket.shard(self._dp.rank, self._dp.size)
        updates = slice(lo, hi) if self._placement.optimizer.sharded else slice(0, bucket.numel)
        flat = torch.zeros(bucket.numel, dtype=dtype, device=self._device)
        grads = torch.zeros(bucket.numel, dtype=acc, device=self._device)
        state = BucketState(
            bucket=bucket,
            params=flat,
            grads=grads,
            shard=slice(lo, hi),
            updates=updates,
            master=flat[updates],
            states={
                n: torch.zeros(updates.stop - updates.start, dtype=acc, device=self._device)
                for n in self._optimizer.states
            },
            segments=self._segments(bucket, updates),
        )
        for slot in bucket.slots:
            self._adopt(state, slot, [p for p in params if p.name == slot.name], acc)
        if acc != dtype:
            state.master = flat[updates].to(acc)
        return state

    def _adopt(self, state: BucketState, slot: Slot, uses: Sequence[LocalParam], acc: torch.dtype) -> None:
        """Make the parameter a view of the flat buffer and give each use its accumulator."""
        view = state.params[slot.offset : slot.stop].view(slot.shape)
        view.copy_(uses[0].param.detach())
        for i, use in enumerate(uses):
            use.param.data = view
            out = (
                state.grads[slot.offset : slot.stop].view(slot.shape)
                if i == 0
                else torch.zeros(slot.shape, dtype=acc, device=self._device)
            )
            accumulator = Accumulator(slot.name, out)
            self.uses[use.unit, id(use.param)] = accumulator
            state.uses.setdefault(slot.name, []).append(accumulator)

    def _segments(self, bucket: Bucket, updates: slice) -> list[tuple[slice, bool]]:
        """Neighbouring parameters with the same decay are updated in one call, padding included."""
        out: list[tuple[slice, bool]] = []
        starts = [*(s.offset for s in bucket.slots), bucket.numel]
        for slot, stop in zip(bucket.slots, starts[1:], strict=True):
            lo, hi = max(slot.offset, updates.start), min(stop, updates.stop)
            if lo >= hi:
                continue
            decay = self._optimizer.decays(slot.name, self.params[slot.name].spec.global_shape)
            part = slice(lo - updates.start, hi - updates.start)
            if out and out[-1][1] == decay:
                part = slice(out.pop()[0].start, part.stop)
            out.append((part, decay))
        return out

    # -- a step ----------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Handler]:
        return {"TIE": self._tie, "REDUCE": self._reduce, "STEP": self._step, "UNSHARD": self._unshard}

    def begin_step(self) -> None:
        """Gradients start anew: the first write of the step overwrites."""
        for state in self.buckets:
            for uses in state.uses.values():
                for use in uses:
                    use.fresh = True

    def end_step(self) -> None:
        """Wait until every rank's parameters are whole again."""
        for state in self.buckets:
            if state.gather is not None:
                state.gather.wait()
                state.gather = None

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
        state = self._bucket(action)
        for slot in state.bucket.slots:
            state.uses[slot.name][0].settle()
        self._sum_partial(state)
        if self._dp.size > 1:
            state.reduction = self._dp.reduce_scatter(state.grads[state.shard], state.grads)

    def _sum_partial(self, state: BucketState) -> None:
        """Sum over tp the gradients of replicated parameters that saw only part of the sequence."""
        partial = [s for s in state.bucket.slots if self.params[s.name].spec.partial_grad]
        if not partial or self._tp.size == 1:
            return
        views = [state.grads[s.offset : s.stop] for s in partial]
        packed = torch.cat(views)
        self._tp.all_reduce(packed).wait()
        for view, part in zip(views, torch.split(packed, [v.numel() for v in views]), strict=True):
            view.copy_(part)

    def wait_reduced(self) -> None:
        """Gradients of this rank's shards are final."""
        for state in self.buckets:
            if state.reduction is not None:
                state.reduction.wait()
                state.reduction = None
                if not self._placement.optimizer.sharded:
                    self._dp.all_gather(state.grads, state.grads[state.shard]).wait()

    def _step(self, action: Action, step: StepState) -> None:
        state = self._bucket(action)
        grads = state.grads[state.updates]
        low = None if state.master.dtype == state.params.dtype else state.params[state.updates]
        for part, decay in state.segments:
            self._optimizer.update(
                state.master[part],
                grads[part],
                {name: t[part] for name, t in state.states.items()},
                Hyper(lr=step.lr, step=step.step + 1, decay=decay, grad_scale=step.grad_scale, pool=self.pool),
                None if low is None else low[part],
            )

    def _unshard(self, action: Action, step: StepState) -> None:
        state = self._bucket(action)
        if self._dp.size > 1:
            state.gather = self._dp.all_gather(state.params, state.params[state.shard])

    # -- views for others ------------------------------------------------------------------------

    def owned_gradients(self) -> list[torch.Tensor]:
        """The gradients this rank contributes to the global norm, flat: its dp shard of every parameter
        it is the first holder of (over tp for replicated, over pp for tied parameters)."""
        out = []
        for state in self.buckets:
            for piece in pieces(state.bucket, self._dp.rank, self._dp.size):
                p = self.params[piece.slot.name]
                replicated = p.spec.dim is None
                elsewhere = p.tie is not None and p.tie.coords[0] != self._coord
                if not elsewhere and not (replicated and self._tp.rank > 0):
                    out.append(state.grads[piece.start : piece.stop])
        return out

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Local (tp shard) tensors by name, whole over dp: ``params``, ``master`` or a state of the optimizer."""
        out = {}
        for state in self.buckets:
            flat = state.params if kind == "params" else self._gathered(state, kind)
            for slot in state.bucket.slots:
                out[slot.name] = flat[slot.offset : slot.stop].view(slot.shape)
        return out

    def _gathered(self, state: BucketState, kind: str) -> torch.Tensor:
        mine = state.master if kind == "master" else state.states[kind]
        if mine.numel() == state.bucket.numel:
            return mine
        full = mine.new_empty(state.bucket.numel)
        self._dp.all_gather(full, mine.contiguous()).wait()
        return full

    def bytes(self) -> dict[str, int]:
        """Bytes by class of state."""
        total = dict.fromkeys(("params", "grads", "optimizer"), 0)
        for s in self.buckets:
            total["params"] += s.params.nbytes
            total["grads"] += s.grads.nbytes + sum(u.out.nbytes for uses in s.uses.values() for u in uses[1:])
            total["optimizer"] += sum(t.nbytes for t in s.states.values())
            total["optimizer"] += s.master.nbytes if s.master.dtype != s.params.dtype else 0
        return total
