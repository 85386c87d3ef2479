"""The tensors of one bucket: which are whole, which are a shard, and when.

Views into a flat tensor stay valid while its storage is given back and taken again, so parameters and
accumulators are made once. A flat tensor that is sharded has bytes only between UNSHARD and RESHARD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch

from ..groups.base import Work
from ..placement import Placement
from .flat import Bucket, Slot
from .guard import guard_again, unguard
from .precision import COMPENSATION, Precision
from .segments import Call, Known, Segment, calls, cut, keep
from .weight_grads import Accumulator


class Flat:
    """A flat tensor whose storage can be given back."""

    def __init__(self, numel: int, dtype: torch.dtype, device: torch.device, *, touch: bool = True) -> None:
        """touch: zero it; otherwise it is to be given back before its first use, and costs addresses only."""
        self.tensor = (torch.zeros if touch else torch.empty)(numel, dtype=dtype, device=device)
        self.whole = True
        self._bytes = self.tensor.untyped_storage().nbytes()
        self.moved: Callable[[int], None] | None = None
        """Is told of the bytes taken (or given back, negative)."""
        self.guarded: list[torch.nn.Parameter] = []
        """Views of it that must not be read while it is not whole."""

    def provide(self) -> torch.Tensor:
        """Take memory; the contents are undefined."""
        if not self.whole:
            self.tensor.untyped_storage().resize_(self._bytes)
            self.whole = True
            unguard(self.guarded)
            if self.moved is not None:
                self.moved(self._bytes)
        return self.tensor

    def release(self) -> None:
        """Give the memory back. Reading a view is undefined from now on."""
        if self.whole:
            self.tensor.untyped_storage().resize_(0)
            self.whole = False
            guard_again(self.guarded)
            if self.moved is not None:
                self.moved(-self._bytes)

    @property
    def nbytes(self) -> int:
        """Of the whole tensor, whether it is there now or not."""
        return self._bytes


@dataclass(frozen=True)
class Residency:
    """The columns of the placement as they hold for one bucket on one dp group."""

    params: bool
    """Parameters are whole only around their use."""
    grads: bool
    """Gradients are whole only from a microbatch's first to its reduction."""
    each: bool
    """Reduced after each microbatch and folded into a shard."""
    optimizer: bool
    """STEP updates this rank's shard only."""
    stays: bool = False
    """Exempt from the sharding of parameters."""
    grad_dtype: str | None = None
    """Of gradients, accumulated and reduced; None: that of the master."""


def residency(placement: Placement, *, tied: bool, stays: bool, dp: int) -> Residency:
    """With one dp rank the shard is the whole, and nothing is gathered or given back."""
    many = dp > 1
    return Residency(
        params=placement.params.sharded and many and not stays,
        grads=placement.grads.sharded and many and not tied,
        each=placement.cadence == "microbatch" and not tied,
        optimizer=placement.optimizer.sharded,
        stays=stays,
        grad_dtype=placement.grads.dtype,
    )


@dataclass(slots=True)
class BucketState:
    """The tensors of one bucket. All flat."""

    bucket: Bucket
    residency: Residency
    shard: slice
    """This dp rank's part of the bucket."""
    updates: slice
    """What STEP updates here: the shard, or the whole bucket."""
    params: Flat
    grads: Flat
    param_shard: torch.Tensor
    """This rank's part of the parameters: a view of them, or all there is of them between uses."""
    grad_shard: torch.Tensor
    """This rank's part of the reduced gradient: a view of the gradients, or what they are folded into."""
    precision: Precision
    master: torch.Tensor
    """What rules update, over ``updates``: parameters in the dtype of the arithmetic, or a view of the parameters where
    there is no such copy."""
    states: dict[str, torch.Tensor]
    """The optimizer's, by name: those of all segments in one flat tensor."""
    segments: list[Segment]
    """What STEP updates, and by which rule."""
    uses: dict[str, list[Accumulator]] = field(default_factory=dict)
    """Accumulators by slot name, in unit order; the first writes straight into grads."""
    folded: bool = False
    """Whether grad_shard holds earlier microbatches of this step."""
    memory: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the reduction keeps from step to step."""
    staged: Callable[[int], None] | None = None
    """Is told of bytes that a reduction takes (or gives back, negative)."""
    gather: Work | None = None
    reduction: Work | None = None
    reduced: bool = False
    """Whether a reduction was posted and not finished."""
    pattern: tuple[int | None, ...] = ()
    """Of the last STEP: what each parameter has missed, None for one that was absent."""
    calls: list[Call] | None = None
    """Its calls."""
    slots: dict[str, Slot] = field(init=False)
    """By name."""

    def __post_init__(self) -> None:
        self.slots = {s.name: s for s in self.bucket.slots}

    @property
    def low(self) -> torch.Tensor | None:
        """Where STEP writes its copy in the parameters' dtype, if the master is separate."""
        if not self.precision.master:
            return None
        return self.param_shard if self.residency.optimizer else self.params.tensor[self.updates]

    @property
    def final_grads(self) -> torch.Tensor:
        """The gradient STEP reads, over ``updates``."""
        return self.grad_shard if self.residency.optimizer else self.grads.tensor[self.updates]

    def settle(self) -> None:
        """Zero what nothing wrote."""
        for uses in self.uses.values():
            uses[0].settle()

    def calls_of(self, missed: Mapping[str, int], absent: AbstractSet[str]) -> list[Call]:
        """The calls of STEP; remembered, since they are the same in nearly every step."""
        pattern: tuple[int | None, ...] = ()
        if missed or absent:
            pattern = tuple(None if s.name in absent else missed.get(s.name, 0) for s in self.bucket.slots)
        if self.calls is None or pattern != self.pattern:
            self.pattern = pattern
            self.calls = [call for segment in self.segments for call in calls(segment, missed, absent)]
        return self.calls

    def rounded_values(self) -> torch.Tensor | None:
        """Parameters that have more precision elsewhere, as they are now, for :meth:`take_over`."""
        return self.master.clone() if self.precision.compensated else None

    def take_over(self, before: torch.Tensor | None) -> None:
        """Parameters were perhaps written by hand: what was has no more precision than it shows, the others keep
        theirs. before: of :meth:`rounded_values`."""
        low = self.low
        if low is not None:
            self.master.copy_(torch.where(self.master.to(low.dtype) == low, self.master, low.to(self.master.dtype)))
        if before is not None:
            for segment in self.segments:
                span = segment.cut.span
                segment.states[COMPENSATION].view(-1).mul_(self.master[span] == before[span])

    def zero_padding(self) -> None:
        """Of the whole gradient: a block of a reduction, or of a rule, may reach into it."""
        for gap in self.bucket.gaps:
            self.grads.tensor[gap].zero_()

    def refresh(self) -> None:
        """The next write of each accumulator overwrites."""
        for uses in self.uses.values():
            for use in uses:
                use.fresh = True


def allocate(
    bucket: Bucket,
    residency: Residency,
    *,
    rank: int,
    dp: int,
    known: Known,
    precision: Precision,
    device: torch.device,
) -> BucketState:
    """The tensors of a bucket, all zero, its parameters whole; :func:`settle_down` follows once they are in."""
    dtype: torch.dtype = getattr(torch, bucket.dtype)
    grad = precision.work if residency.grad_dtype is None else getattr(torch, residency.grad_dtype)
    lo, hi = bucket.shard(rank, dp)
    updates = slice(lo, hi) if residency.optimizer else slice(0, bucket.numel)
    grads = Flat(bucket.numel, grad, device, touch=not residency.grads)
    params = Flat(bucket.numel, dtype, device)
    own_params = torch.zeros(hi - lo, dtype=dtype, device=device) if residency.params else params.tensor[lo:hi]
    separate = residency.each or residency.grads
    own_grads = torch.zeros(hi - lo, dtype=grad, device=device) if separate else grads.tensor[lo:hi]
    states, segments = keep(cut(bucket, updates, known), known, precision, device)
    return BucketState(
        bucket=bucket,
        residency=residency,
        shard=slice(lo, hi),
        updates=updates,
        params=params,
        grads=grads,
        param_shard=own_params,
        grad_shard=own_grads,
        precision=precision,
        master=own_params if residency.optimizer else params.tensor[updates],
        states=states,
        segments=segments,
    )


def settle_down(state: BucketState) -> None:
    """Take this rank's shards of the initial parameters and give back what the placement does not keep whole."""
    if state.residency.params:
        state.param_shard.copy_(state.params.tensor[state.shard])
    if state.precision.master:
        whole = state.param_shard if state.residency.optimizer else state.params.tensor[state.updates]
        state.master = whole.to(state.precision.work)
    if state.residency.params:
        state.params.release()
    if state.residency.grads:
        state.grads.release()
