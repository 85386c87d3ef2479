"""Parameters, gradients and optimizer state of one rank, in the flat layout, and the actions on them.

Handlers of TIE, REDUCE, STEP, UNSHARD and RESHARD. Which bytes live where is the placement's choice; which
numbers are added in which order is the same for all of them:

    gradient = sum over dp ranks, in rank order, of (sum over uses in unit order, of
               (sum over microbatches in order))

so all stages end in the same bits (stage 0 reduces by reduce_scatter and then gathers). With cadence
``microbatch`` the two inner sums change places.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..actions import Action
from ..groups.base import Group
from ..native import Pool
from ..optim import Optimizer, Rule, Treatment
from ..passes import BucketInfo
from ..placement import Placement
from ..shards import ShardSpec
from . import ties as tied
from .bucket import BucketState, allocate, residency, settle_down
from .executor import Handler, StepState
from .flat import Entry, Packer, Slot, make_bucket, place
from .guard import guard
from .precision import check_rounding, precision
from .reduction import Exact, Reduction
from .segments import Known
from .spent import Spent
from .ties import Tie
from .updates import Updates
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
    """The state of all units on one rank. Parameters are handed over with ``add``, then ``finish`` is called.

    dp: the data-parallel ranks the state is sharded over; replicas: those that hold the same shard (one, but for
    hybrid sharding); tp: group; tie_groups: by tie index, the group over the coordinates that hold the tie (absent
    when it is one coordinate). pool: threads for element-wise work on the host; reduction: how gradients are summed
    over dp; seed: of the draws that round by chance.
    """

    def __init__(
        self,
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
        seed: int = 0,
    ) -> None:
        self.dp, self.replicas, self.tp, self.coord = dp, replicas, tp, coord
        self.pool = pool
        self._tie_groups = tie_groups
        self._placement = placement
        self._optimizer = optimizer
        self._device = device
        self._reduction = reduction or Exact()
        self.uses: dict[tuple[int, int], Accumulator] = {}
        """(unit, id(parameter)) -> its accumulator."""
        self.params: dict[str, LocalParam] = {}
        """By canonical name, in unit order; of tied uses the first on this rank."""
        self.known = Known()
        self._updates = Updates(tp, self.known.specs, seed=seed, pool=pool)
        self.missed: dict[str, int] = {}
        """By canonical name, the steps of the run in which a parameter was not updated because it had no gradient
        on any rank; 0 where not listed. The same on every rank that has the parameter. A rule counts the others."""
        self.spent = Spent()
        """What the last step waited for, and what its updates took."""
        self._absent: frozenset[str] = frozenset()
        self.buckets: tuple[BucketState, ...] = ()
        self._numbers: tuple[list[Rule], list[Treatment]] = ([], [])
        self._packer = Packer(max(1, placement.bucket_bytes // 4), dp.size)
        self._waiting: dict[str, list[LocalParam]] = {}
        """Uses of parameters that are in no bucket yet."""
        self._made: list[tuple[tuple[int, int], BucketState]] = []
        self._of_name: dict[str, BucketState] = {}
        self._of_unit: dict[int, list[BucketState]] = {}
        self._units_of: dict[str, set[int]] = {}

    # -- building --------------------------------------------------------------------------------

    def add(self, params: Sequence[LocalParam]) -> None:
        """Take over all uses of the trainable parameters of a unit; units come in order.

        Whenever enough of them for a bucket have come, it gets its memory, the parameters become views into it,
        and what the placement shards is given back: so a model is built that as a whole would not fit.
        """
        entries = []
        for p in params:
            self._units_of.setdefault(p.name, set()).add(p.unit)
            known = self._of_name.get(p.name)
            if known is not None:
                self._use(known, known.slots[p.name], p)
                continue
            if p.name not in self._waiting:
                self.params[p.name] = p
                entries.append(self._entry(p))
            self._waiting.setdefault(p.name, []).append(p)
        for run in self._packer.add(entries):
            self._allocate(run)

    def finish(self) -> list[BucketState]:
        """All units have come: make the last buckets, and number them. Returns those that are new since the last
        time: parameters that become trainable later get buckets of their own."""
        for run in self._packer.close():
            self._allocate(run)
        new = [state for _, state in sorted(self._made, key=lambda made: made[0])]
        for index, state in enumerate(new, len(self.buckets)):
            state.bucket = replace(state.bucket, index=index)
        self.buckets, self._made = (*self.buckets, *new), []
        check_rounding(self._placement, {b.params.tensor.dtype for b in self.buckets})
        return new

    def infos(self) -> tuple[BucketInfo, ...]:
        """The buckets as the passes see them."""
        out = []
        for b in self.buckets:
            names = [s.name for s in b.bucket.slots]
            units = {u for name in names for u in self._units_of[name]}
            ties = {t.index for name in names if (t := self.params[name].tie) is not None}
            out.append(BucketInfo(b.bucket.index, tuple(sorted(units)), tuple(sorted(ties)), b.residency.stays))
        return tuple(out)

    def _entry(self, p: LocalParam) -> Entry:
        rules, treatments = self._numbers
        self.known.specs[p.name] = p.spec
        treatment = self.known.treatments[p.name] = self._optimizer.treatment(p.name, p.spec.global_shape)
        rule = treatment.rule
        if rule not in rules:
            rules.append(rule)
        if treatment not in treatments:
            treatments.append(treatment)
        numel = math.prod(p.spec.global_shape)
        parts = self.tp.size if p.spec.dim is not None else 1
        return Entry(
            name=p.name,
            unit=p.unit,
            shape=tuple(p.param.shape),
            dtype=str(p.param.dtype).removeprefix("torch."),
            tied=p.tie is not None,
            rule=rules.index(rule),
            whole=rule.reach is None,
            treatment=treatments.index(treatment),
            size=-(-numel // parts),
            stays=self._placement.params.sharded and numel < self._placement.persist,
        )

    def _allocate(self, run: Sequence[Entry]) -> None:
        bucket = make_bucket(0, run, self.dp.size)
        state = allocate(
            bucket,
            residency(self._placement, tied=run[0].tied, stays=run[0].stays, dp=self.dp.size),
            rank=self.dp.rank,
            dp=self.dp.size,
            known=self.known,
            precision=precision(self._placement, getattr(torch, run[0].dtype), self._numbers[0][run[0].rule]),
            device=self._device,
        )
        for slot in bucket.slots:
            uses = self._waiting.pop(slot.name)
            state.params.tensor[slot.offset : slot.stop].view(slot.shape).copy_(uses[0].param.detach())
            self._of_name[slot.name] = state
            for use in uses:
                self._use(state, slot, use)
        settle_down(state)
        self._made.append((place(run), state))

    def _use(self, state: BucketState, slot: Slot, use: LocalParam) -> None:
        """Make the parameter a view of the flat buffer, and give the use its accumulator."""
        others = state.uses.setdefault(slot.name, [])
        grad = state.grads.tensor
        if others:  # of a tie, whose uses on a rank are one object
            out = torch.zeros(slot.shape, dtype=grad.dtype, device=grad.device)
        else:
            use.param.data = state.params.tensor[slot.offset : slot.stop].view(slot.shape)
            out = grad[slot.offset : slot.stop].view(slot.shape)
        if state.residency.params:
            if not others:
                guard(use.param, slot.name, lambda: state.params.whole)
                state.params.guarded.append(use.param)
            if not any(known is state for known in self._of_unit.setdefault(use.unit, [])):
                self._of_unit[use.unit].append(state)
        self.uses[use.unit, id(use.param)] = accumulator = Accumulator(slot.name, out)
        others.append(accumulator)

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
        self.spent.start()
        for state in self.buckets:
            state.refresh()
            state.folded = False
            for uses in state.uses.values():
                for use in uses:
                    use.written = False

    def end_step(self) -> None:
        """Wait until every rank's parameters are as the placement keeps them."""
        for state in self.buckets:
            self._finish_gather(state)

    def ready(self, unit: int) -> None:
        """Wait for the parameters that a unit is about to use."""
        for state in self._of_unit.get(unit, ()):
            self._finish_gather(state)

    def _finish_gather(self, state: BucketState) -> None:
        if state.gather is not None:
            self.spent.wait("gather", state.gather)
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
            self.spent.wait("reduce", group.all_gather(gathered, padded))
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
        if self.dp.size > 1:
            grads = state.grads.tensor
            state.reduction = self._reduction.post(self.dp, grads[state.shard], grads, state.memory)
            self._stage(state, 1)

    def staging(self, state: BucketState) -> int:
        """Bytes that a reduction of the bucket takes while it is under way."""
        return self._reduction.staging(state.bucket.numel, self.dp.size) if self.dp.size > 1 else 0

    def _stage(self, state: BucketState, sign: int) -> None:
        if state.staged is not None:
            state.staged(sign * self.staging(state))

    def _sum_partial(self, state: BucketState) -> None:
        """Sum over tp the gradients of replicated parameters that saw only part of the sequence."""
        partial = [s for s in state.bucket.slots if self.params[s.name].spec.partial_grad]
        if not partial or self.tp.size == 1:
            return
        views = [state.grads.tensor[s.offset : s.stop] for s in partial]
        packed = torch.cat(views)
        self.spent.wait("reduce", self.tp.all_reduce(packed))
        for view, part in zip(views, torch.split(packed, [v.numel() for v in views]), strict=True):
            view.copy_(part)

    def _reshard(self, action: Action, step: StepState) -> None:
        """Keep only this rank's part: of the parameters, or of a reduced gradient, which is added to those before."""
        state = self._bucket(action)
        if action.subject.kind == "params":
            self._finish_gather(state)
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
            self.spent.wait("reduce", state.reduction)
            state.reduction = None
            self._stage(state, -1)
        if state.reduced:
            state.reduced = False
            if self.replicas.size > 1:
                self.spent.wait("reduce", self.replicas.all_reduce(state.grads.tensor[state.shard]))

    def wait_reduced(self) -> None:
        """Gradients are final: this rank's shards, or all of them where the update is not sharded."""
        for state in self.buckets:
            self._finish_reduction(state)
            if state.residency.optimizer:
                continue
            if self.dp.size > 1:
                self.spent.wait("reduce", self.dp.all_gather(state.grads.tensor, state.grad_shard))
            elif state.residency.each:
                state.grads.tensor.copy_(state.grad_shard)

    def present(self) -> list[bool]:
        """Whether each parameter of ``params`` got a gradient on this rank in this step."""
        return [any(use.written for use in self._of_name[name].uses[name]) for name in self.params]

    def leave_out(self, absent: frozenset[str]) -> None:
        """These had no gradient on any rank in a step that is not skipped: STEP does not touch them."""
        self._absent = absent
        for name in absent:
            self.missed[name] = self.missed.get(name, 0) + 1

    def skip(self) -> None:
        """A gradient was not finite; in blocks of a compressed reduction that may have reached the padding."""
        for state in self.buckets:
            if state.grads.whole:
                state.zero_padding()

    def _step(self, action: Action, step: StepState) -> None:
        if step.skipped:
            return
        begin, state = time.perf_counter_ns(), self._bucket(action)
        for call in state.calls_of(self.missed, self._absent):
            self._updates(state, call, step)
        self.spent.add("optimizer", begin, time.perf_counter_ns())

    def _unshard(self, action: Action, step: StepState) -> None:
        """Make room for a whole gradient, or post the gather of the parameters."""
        state = self._bucket(action)
        if action.subject.kind == "grads":
            state.grads.provide()
            state.zero_padding()  # new memory holds anything
        elif self.dp.size > 1:
            state.gather = self.dp.all_gather(state.params.provide(), state.param_shard)

    @contextmanager
    def gathered(self, names: Collection[str] | None = None) -> Iterator[None]:
        """Whole parameters for reading and writing between steps; collective over dp. names: of those that are
        wanted; None: all.

        What is written is kept: by the rank that owns the part, so every rank must write the same.
        """
        wanted = [b for b in self.buckets if names is None or any(s.name in names for s in b.bucket.slots)]
        before = [state.rounded_values() for state in wanted]
        for state in wanted:
            if state.residency.params:
                self.dp.all_gather(state.params.provide(), state.param_shard).wait()
        try:
            yield
        finally:
            for state, values in zip(wanted, before, strict=True):
                if state.residency.params:
                    state.param_shard.copy_(state.params.tensor[state.shard])
                    state.params.release()
                state.take_over(values)
