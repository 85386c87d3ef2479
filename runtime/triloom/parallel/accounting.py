"""Bytes of the sharded state by class, for the ledger and for estimates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import partial

import torch
from torch import nn

from ..memory import BucketBytes, Ledger
from .activations import storages
from .bucket import BucketState
from .precision import COMPENSATION
from .sharded import ShardedState


def bucket_classes(state: BucketState) -> Counter[str]:
    """What a bucket holds all the time. Alignment is a class of its own, so that the others are what was asked for."""
    out: Counter[str] = Counter()
    bucket, rows = state.bucket, state.residency

    def flat(kind: str, t: torch.Tensor, part: slice) -> None:
        inside = (min(s.stop, part.stop) - max(s.offset, part.start) for s in bucket.slots)
        used = sum(n for n in inside if n > 0) * t.element_size()
        out[kind] += used
        out["padding"] += t.numel() * t.element_size() - used

    everything = slice(0, bucket.numel)
    if rows.params:
        flat("params", state.param_shard, state.shard)
    else:
        flat("params", state.params.tensor, everything)
    if rows.grads or rows.each:
        flat("grads", state.grad_shard, state.shard)
    if not rows.grads:
        flat("grads", state.grads.tensor, everything)
    if state.master.dtype != state.params.tensor.dtype:
        flat("master", state.master, state.updates)
    for name, t in state.states.items():
        kind = "master" if name == COMPENSATION else "moments"
        if t.numel() == state.master.numel():
            flat(kind, t, state.updates)
        else:
            out[kind] += t.nbytes
    out["ties"] = sum(use.out.nbytes for uses in state.uses.values() for use in uses[1:])
    return out


def bucket_moves(state: BucketState, staging: int) -> BucketBytes:
    """What UNSHARD takes and RESHARD gives back. staging: bytes of a reduction under way."""
    rows = state.residency
    return BucketBytes(
        gathered=state.params.nbytes if rows.params else 0,
        grad_bucket=state.grads.nbytes if rows.grads else 0,
        staging=staging,
    )


def feedback_bytes(buckets: Iterable[BucketState]) -> int:
    """What a compressed reduction keeps; appears with the first of them."""
    return sum(t.nbytes for b in buckets for t in b.memory.values())


def fixed_bytes(modules: Iterable[nn.Module], known: Collection[int] = ()) -> int:
    """Frozen parameters and buffers, each storage once. known: ids of parameters that have state all the same."""
    everything = (t for m in modules for t in (*m.parameters(), *m.buffers()))
    return sum(storages(t for t in everything if not t.requires_grad and id(t) not in known).values())


def enter(ledger: Ledger, state: ShardedState, new: Iterable[BucketState], modules: Iterable[nn.Module]) -> None:
    """Put new buckets into the ledger, and let it know of what comes and goes; state and modules: all there are."""
    for bucket in new:
        for kind, nbytes in bucket_classes(bucket).items():
            ledger.add(kind, nbytes)
        bucket.staged = partial(ledger.add, "staging")
        if bucket.residency.params:
            bucket.params.moved = partial(ledger.add, "gathered")
        if bucket.residency.grads:
            bucket.grads.moved = partial(ledger.add, "grad_buckets")
    ledger.set("fixed", fixed_bytes(modules, {param for _, param in state.uses}))
