"""The sharded state as others look at it: the norm at what a rank owns, export and tests at whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch

from ..groups.base import Group
from ..optim.base import BLOCK, Spec
from ..shards import ShardSpec
from .bucket import BucketState
from .flat import Bucket, Piece, Slot, pieces
from .segments import Known, kept_whole
from .sharded import ShardedState

# ---------------------------------------------------------------- gradients of the norm


def owned_gradients(state: ShardedState) -> list[tuple[str, torch.Tensor]]:
    """The gradients this rank contributes to the global norm, by name and flat: its dp shard of every
    parameter it is the first holder of (over tp for replicated, over pp for tied parameters)."""
    return [
        (piece.slot.name, bucket.grad_shard[piece.start - bucket.shard.start : piece.stop - bucket.shard.start])
        for bucket, piece in _owned_pieces(state)
    ]


def owned_runs(state: ShardedState) -> list[torch.Tensor]:
    """The same gradients as few tensors: neighbours without padding between them are one."""
    runs: list[tuple[BucketState, int, int]] = []
    for bucket, piece in _owned_pieces(state):
        if runs and runs[-1][0] is bucket and runs[-1][2] == piece.start:
            runs[-1] = (bucket, runs[-1][1], piece.stop)
        else:
            runs.append((bucket, piece.start, piece.stop))
    return [b.grad_shard[lo - b.shard.start : hi - b.shard.start] for b, lo, hi in runs]


def _owned_pieces(state: ShardedState) -> Iterator[tuple[BucketState, Piece]]:
    if state.replicas.rank > 0:
        return
    for bucket in state.buckets:
        for piece in pieces(bucket.bucket, state.dp.rank, state.dp.size):
            p = state.params[piece.slot.name]
            replicated = p.spec.dim is None
            elsewhere = p.tie is not None and p.tie.coords[0] != state.coord
            if not elsewhere and not (replicated and state.tp.rank > 0):
                yield bucket, piece


# ---------------------------------------------------------------- whole tensors


_SHARD: Mapping[str, Callable[[BucketState], torch.Tensor]] = {
    "params": lambda b: b.param_shard,
    "master": lambda b: b.master,
    "grads": lambda b: b.grad_shard,
}
"""States with an element for each parameter that are not the optimizer's -> what this dp rank has of them."""


def whole(state: ShardedState, kind: str) -> dict[str, torch.Tensor]:
    """Local (tp shard) tensors by name, whole over dp: ``params``, ``master``, ``grads`` (the last step's, times the
    loss scale, before clipping) or a state of the optimizer.

    States are in the parameter's shape if they have as many elements; those of blocks are flat, single numbers are
    the parameter's own. Integers come as int64. Collective over dp.
    """
    return {name: t for part in by_bucket(state, kind) for name, t in part.items()}


def by_bucket(state: ShardedState, kind: str) -> Iterator[dict[str, torch.Tensor]]:
    """The same, one bucket at a time: no more than one is whole at once."""
    for b in state.buckets:
        if kind in _SHARD:
            flat = _gathered(b, kind, state.dp)
            yield {slot.name: flat[slot.offset : slot.stop].view(slot.shape) for slot in b.bucket.slots}
        else:
            gather = _whole_tensors if b.bucket.whole else _flat_pieces
            dp = state.dp if b.residency.optimizer else None
            yield gather(b, kind, state.known, dp)


def _gathered(b: BucketState, kind: str, dp: Group) -> torch.Tensor:
    if kind == "params" and b.params.whole:
        return b.params.tensor
    mine = _SHARD[kind](b)
    if mine.numel() == b.bucket.numel:
        return mine
    full = mine.new_empty(b.bucket.numel)
    dp.all_gather(full, mine.contiguous()).wait()
    return full


def specs(state: ShardedState, tensors: Mapping[str, torch.Tensor]) -> dict[str, ShardSpec]:
    """How tensors of :func:`whole` are split over tp: like their parameter, but for those that a rule on whole tensors
    keeps in another shape, which every rank has."""
    out = {}
    for name, t in tensors.items():
        p = state.params[name]
        replicated = state.known.treatments[name].rule.reach is None and t.shape != p.param.shape
        out[name] = ShardSpec(tuple(t.shape)) if replicated else p.spec
    return out


def _flat_pieces(b: BucketState, kind: str, known: Known, dp: Group | None) -> dict[str, torch.Tensor]:
    bucket = b.bucket
    if not bucket.slots:
        return {}
    spec = b.precision.specs(known.treatments[bucket.slots[0].name].rule, (BLOCK,)).get(kind)
    if spec is None:
        return {}
    mine = b.states.get(kind, torch.zeros(0, dtype=spec.dtype))
    if not spec.shape:
        return _numbers(bucket, mine, dp)
    per = BLOCK // spec.shape[0]
    share = bucket.numel // (1 if dp is None else dp.size) // per
    flat = _gather(mine, share, dp).reshape(-1)
    out = {}
    for s in bucket.slots:
        part = flat[s.offset // per : -(-s.stop // per)]
        out[s.name] = part.view(s.shape) if per == 1 else part
    return out


def _numbers(bucket: Bucket, mine: torch.Tensor, dp: Group | None) -> dict[str, torch.Tensor]:
    """A state of one number a parameter, equal on all ranks that have a part of it."""
    ranks = 1 if dp is None else dp.size
    everyone = _gather(mine, len(bucket.slots), dp)
    out: dict[str, torch.Tensor] = {}
    used = [0] * ranks
    for slot, stop in zip(bucket.slots, [*(s.offset for s in bucket.slots[1:]), bucket.numel], strict=True):
        for rank in range(ranks):
            lo, hi = bucket.shard(rank, ranks)
            if max(slot.offset, lo) < min(stop, hi):
                out.setdefault(slot.name, everyone[rank, used[rank]])
                used[rank] += 1
    return out


def _whole_tensors(b: BucketState, kind: str, known: Known, dp: Group | None) -> dict[str, torch.Tensor]:
    ranks = 1 if dp is None else dp.size
    rows: list[list[tuple[Slot, Spec]]] = []
    for rank in range(ranks):
        have = [
            (
                p.slot,
                kept_whole(b.precision, known.treatments[p.slot.name].rule, p.slot.shape, known.specs[p.slot.name]),
            )
            for p in pieces(b.bucket, rank, ranks)
        ]
        rows.append([(slot, states[kind]) for slot, states in have if kind in states])
    dtypes = [spec.dtype for row in rows for _, spec in row]
    if not dtypes:
        return {}
    longest = max(sum(math.prod(spec.shape) for _, spec in row) for row in rows)
    gathered = _gather(b.states.get(kind, torch.zeros(0, dtype=dtypes[0])), longest, dp)
    out = {}
    for row, flat in zip(rows, gathered, strict=True):
        start = 0
        for slot, spec in row:
            stop = start + math.prod(spec.shape)
            out[slot.name] = flat[start:stop].view(spec.shape)
            start = stop
    return out


def _gather(mine: torch.Tensor, length: int, dp: Group | None) -> torch.Tensor:
    """``(ranks, length)``: every rank's flat tensor, padded to ``length``."""
    values = mine if mine.is_floating_point() else mine.to(torch.int64)
    padded = values.new_zeros(length)
    padded[: values.numel()] = values
    if dp is None:
        return padded[None]
    everyone = padded.new_empty(dp.size, length)
    dp.all_gather(everyone, padded).wait()
    return everyone
