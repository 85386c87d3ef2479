"""Which rule updates which part of a bucket, and the tensors that it keeps for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..groups.base import Group
from ..optim.base import BLOCK, Optimizer, Spec, Treatment
from ..shards import ShardSpec
from .flat import ALIGN, Bucket, Slot, pieces

Treatments = Mapping[str, Treatment]
"""By canonical name of the parameter."""


class Cut(NamedTuple):
    """A part of what STEP updates on this rank: ``span`` counts from the start of that."""

    span: slice
    shape: tuple[int, ...]
    """As the rule sees it: flat, or the parameter's."""
    treatment: Treatment


@dataclass(frozen=True, slots=True)
class Segment:
    """A cut with its states: one call of its rule a step."""

    span: slice
    shape: tuple[int, ...]
    treatment: Treatment
    states: Mapping[str, torch.Tensor]


def cut(bucket: Bucket, updates: slice, treatments: Treatments) -> list[Cut]:
    """The calls that update ``updates`` of a bucket.

    Of a rule on whole tensors one a parameter; of others one for neighbouring parameters with equal
    treatments, padding included, so that lengths and starts are multiples of ALIGN.
    """
    if bucket.whole:
        return [
            Cut(slice(s.offset - updates.start, s.stop - updates.start), s.shape, treatments[s.name])
            for s in bucket.slots
            if s.numel and updates.start <= s.offset < updates.stop
        ]
    out: list[Cut] = []
    starts = [*(s.offset for s in bucket.slots), bucket.numel]
    for slot, stop in zip(bucket.slots, starts[1:], strict=True):
        lo, hi = max(slot.offset, updates.start) - updates.start, min(stop, updates.stop) - updates.start
        if lo >= hi:
            continue
        treatment = treatments[slot.name]
        if out and out[-1].treatment == treatment:
            lo = out.pop().span.start
        out.append(Cut(slice(lo, hi), (hi - lo,), treatment))
    return out


def keep(
    cuts: Sequence[Cut], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, torch.Tensor], list[Segment]]:
    """Zeroed states of all cuts, by name one flat tensor in the order of the cuts, and the views of each cut."""
    specs = [c.treatment.rule.states(c.shape, dtype) for c in cuts]
    totals: dict[str, Spec] = {}
    for of_cut in specs:
        for name, spec in of_cut.items():
            before = totals.get(name, Spec((0,), spec.dtype))
            if before.dtype != spec.dtype:
                raise ConfigError(f"state {name!r} is kept in {before.dtype} and in {spec.dtype}; use two names")
            totals[name] = Spec((before.shape[0] + math.prod(spec.shape),), spec.dtype)
    flats = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in totals.items()}
    used = dict.fromkeys(flats, 0)
    segments = []
    for c, of_cut in zip(cuts, specs, strict=True):
        views = {}
        for name, spec in of_cut.items():
            start = used[name]
            used[name] += math.prod(spec.shape)
            views[name] = flats[name][start : used[name]].view(spec.shape)
        segments.append(Segment(c.span, c.shape, c.treatment, views))
    return flats, segments


def padding(bucket: Bucket, updates: slice, treatments: Treatments) -> list[slice]:
    """What must be zero in the gradient before a rule that looks at neighbours; none for element-wise ones."""
    if all(treatments[s.name].rule.reach in (1, None) for s in bucket.slots):
        return []
    stops = [*(s.offset for s in bucket.slots[1:]), bucket.numel]
    gaps = [(max(s.stop, updates.start), min(e, updates.stop)) for s, e in zip(bucket.slots, stops, strict=True)]
    return [slice(lo - updates.start, hi - updates.start) for lo, hi in gaps if lo < hi]


def check_rules(specs: Mapping[str, ShardSpec], optimizer: Optimizer, tp: int) -> None:
    """Raise ConfigError for a rule on whole tensors and a parameter that is split over tp."""
    for name, spec in specs.items():
        rule = optimizer.treatment(name, spec.global_shape).rule
        if rule.reach is None and spec.dim is not None and tp > 1:
            raise ConfigError(
                f"{type(rule).__name__} updates whole tensors, and {name} {spec.global_shape} is split over tp={tp}: "
                "on its parts it would be another algorithm. Use tp=1, or give the parameter to an element-wise rule"
            )


# ---------------------------------------------------------------- all of a state, for tests and export


def whole_states(
    bucket: Bucket,
    mine: Mapping[str, torch.Tensor],
    kind: str,
    treatments: Treatments,
    *,
    dp: Group,
    sharded: bool,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """State ``kind`` of every parameter of a bucket that has one, gathered over dp where it is sharded.

    In the parameter's shape if it has as many elements; states of blocks are flat. Integers come as int64.
    """
    gather = _whole_tensors if bucket.whole else _flat_pieces
    return gather(bucket, mine, kind, treatments, dp if sharded else None, dtype)


def _flat_pieces(
    bucket: Bucket,
    mine: Mapping[str, torch.Tensor],
    kind: str,
    treatments: Treatments,
    dp: Group | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    if not bucket.slots:
        return {}
    rule = treatments[bucket.slots[0].name].rule
    spec = rule.states((BLOCK,), dtype).get(kind)
    if spec is None:
        return {}
    if spec.shape not in ((BLOCK,), (1,)):
        raise ConfigError(f"state {kind!r} of {type(rule).__name__} belongs to a piece, not to a parameter")
    per = BLOCK // spec.shape[0]
    share = bucket.numel // (1 if dp is None else dp.size) // per
    flat = _gather(mine.get(kind, torch.zeros(0, dtype=spec.dtype)), share, dp).reshape(-1)
    out = {}
    for s in bucket.slots:
        part = flat[s.offset // per : -(-s.stop // per)]
        out[s.name] = part.view(s.shape) if per == 1 else part
    return out


def _whole_tensors(
    bucket: Bucket,
    mine: Mapping[str, torch.Tensor],
    kind: str,
    treatments: Treatments,
    dp: Group | None,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    ranks = 1 if dp is None else dp.size
    rows: list[list[tuple[Slot, Spec]]] = []
    for rank in range(ranks):
        have = [(p.slot, treatments[p.slot.name].rule.states(p.slot.shape, dtype)) for p in pieces(bucket, rank, ranks)]
        rows.append([(slot, states[kind]) for slot, states in have if kind in states])
    specs = [spec for row in rows for _, spec in row]
    if not specs:
        return {}
    longest = max(sum(math.prod(spec.shape) for _, spec in row) for row in rows)
    gathered = _gather(mine.get(kind, torch.zeros(0, dtype=specs[0].dtype)), longest, dp)
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


if ALIGN % BLOCK:
    raise RuntimeError(f"shards start at multiples of {ALIGN}, which would cut blocks of {BLOCK}")
