"""Which rule updates which part of a bucket, and the tensors that it keeps for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..optim.base import BLOCK, Rule, Spec, Treatment
from ..shards import ShardSpec
from .flat import ALIGN, Bucket
from .precision import Precision


@dataclass(frozen=True)
class Known:
    """How the parameters of a rank are updated and split, by canonical name; filled while units are added."""

    treatments: dict[str, Treatment] = field(default_factory=dict)
    specs: dict[str, ShardSpec] = field(default_factory=dict)


def kept_whole(how: Precision, rule: Rule, shape: tuple[int, ...], spec: ShardSpec) -> Mapping[str, Spec]:
    """What a rule on whole tensors keeps where a tp rank has the part ``shape`` of one: of states in the parameter's
    shape its part, the others whole on every rank."""
    specs = how.specs(rule, spec.global_shape)
    return {n: s._replace(shape=shape) if s.shape == spec.global_shape else s for n, s in specs.items()}


EACH = 0
"""In ``Segment.per``: one number for each parameter, however many elements it has."""


class Part(NamedTuple):
    """One parameter's place in a cut, up to where the next one starts."""

    name: str
    start: int
    stop: int


class Cut(NamedTuple):
    """A part of what STEP updates on this rank: ``span`` counts from the start of that."""

    span: slice
    shape: tuple[int, ...]
    """As the rule sees it: flat, or the parameter's."""
    treatment: Treatment
    parts: tuple[Part, ...]
    """The parameters in it, relative to its start."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A cut with its states."""

    cut: Cut
    states: Mapping[str, torch.Tensor]
    per: Mapping[str, int]
    """Elements of the parameter to an element of a state: 1, BLOCK, or EACH."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a rule: of neighbouring parameters that are treated alike and were updated equally often."""

    span: slice
    """In what STEP updates on this rank."""
    shape: tuple[int, ...]
    treatment: Treatment
    states: Mapping[str, torch.Tensor]
    per: Mapping[str, int]
    parts: tuple[Part, ...]
    """The parameters, relative to the start of the call."""
    missed: int
    """Steps of the run that these parameters were not updated in."""
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """States of which there is one for each parameter: the one that the rule sees, and the others, which follow it."""


def cut(bucket: Bucket, updates: slice, known: Known) -> list[Cut]:
    """The calls that update ``updates`` of a bucket.

    Of a rule on whole tensors one a parameter; of others one for neighbouring parameters with equal
    treatments, padding included, so that lengths and starts are multiples of ALIGN.
    """
    treatments = known.treatments
    if bucket.whole:
        return [
            Cut(slice(lo, lo + s.numel), s.shape, treatments[s.name], (Part(s.name, 0, s.numel),))
            for s in bucket.slots
            if s.numel and 0 <= (lo := s.offset - updates.start) < updates.stop - updates.start
        ]
    out: list[Cut] = []
    starts = [*(s.offset for s in bucket.slots), bucket.numel]
    for slot, stop in zip(bucket.slots, starts[1:], strict=True):
        lo, hi = max(slot.offset, updates.start) - updates.start, min(stop, updates.stop) - updates.start
        if lo >= hi:
            continue
        treatment = treatments[slot.name]
        joins = bool(out) and out[-1].treatment == treatment
        before = out.pop() if joins else Cut(slice(lo, lo), (0,), treatment, ())
        first = before.span.start
        here = Part(slot.name, lo - first, hi - first)
        out.append(Cut(slice(first, hi), (hi - first,), treatment, (*before.parts, here)))
    return out


def keep(
    cuts: Sequence[Cut], known: Known, how: Precision, device: torch.device
) -> tuple[dict[str, torch.Tensor], list[Segment]]:
    """Zeroed states of all cuts, by name one flat tensor in the order of the cuts, and the views of each cut."""
    shaped = [_shapes(c, known, how) for c in cuts]
    totals: dict[str, Spec] = {}
    for of_cut in shaped:
        for name, (spec, _) in of_cut.items():
            before = totals.get(name, Spec((0,), spec.dtype))
            if before.dtype != spec.dtype:
                raise ConfigError(f"state {name!r} is kept in {before.dtype} and in {spec.dtype}; use two names")
            totals[name] = Spec((before.shape[0] + math.prod(spec.shape),), spec.dtype)
    flats = {name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for name, spec in totals.items()}
    used = dict.fromkeys(flats, 0)
    segments = []
    for c, of_cut in zip(cuts, shaped, strict=True):
        views = {}
        for name, (spec, _) in of_cut.items():
            start = used[name]
            used[name] += math.prod(spec.shape)
            views[name] = flats[name][start : used[name]].view(spec.shape)
        segments.append(Segment(c, views, {name: per for name, (_, per) in of_cut.items()}))
    return flats, segments


def _shapes(c: Cut, known: Known, how: Precision) -> dict[str, tuple[Spec, int]]:
    """What is kept for a cut, and how many elements one of it is for. Single numbers are kept for each parameter,
    since one that had no gradient falls behind the others."""
    rule = c.treatment.rule
    if rule.reach is None:
        of_whole = kept_whole(how, rule, c.shape, known.specs[c.parts[0].name])
        return {name: (spec, 1) for name, spec in of_whole.items()}
    (n,) = c.shape
    sizes = {(n,): 1, (n // BLOCK,): BLOCK, (): EACH}
    out = {}
    for name, spec in how.specs(rule, c.shape).items():
        if spec.shape not in sizes:
            raise ConfigError(
                f"state {name!r} of {type(rule).__name__} has shape {spec.shape} for a piece of {n} "
                f"elements; it must have one number for each, for each block of {BLOCK}, or be a single one"
            )
        per = sizes[spec.shape]
        out[name] = (spec if per else Spec((len(c.parts),), spec.dtype), per)
    return out


def calls(segment: Segment, missed: Mapping[str, int], absent: AbstractSet[str]) -> list[Call]:
    """The calls that update a segment when the parameters ``absent`` are left out. missed: updates that each
    parameter has missed, 0 where not listed."""
    c = segment.cut
    places = [(i, p, missed.get(p.name, 0)) for i, p in enumerate(c.parts) if p.name not in absent]
    if c.treatment.rule.reach is None:
        return [Call(c.span, c.shape, c.treatment, segment.states, segment.per, c.parts, m) for _, _, m in places]

    runs: list[tuple[int, int, int]] = []
    """First parameter, the one after the last, and what they have missed."""
    for i, _, behind in places:
        if runs and runs[-1][1:] == (i, behind) and _same_numbers(segment, runs[-1][0], i):
            runs[-1] = (runs[-1][0], i + 1, behind)
        else:
            runs.append((i, i + 1, behind))
    return [_call(segment, *run) for run in runs]


def _same_numbers(segment: Segment, one: int, other: int) -> bool:
    return all(bool(t[one] == t[other]) for name, t in segment.states.items() if segment.per[name] == EACH)


def _call(segment: Segment, first: int, last: int, missed: int) -> Call:
    """Of the parameters ``first`` to (not including) ``last`` of a segment."""
    c = segment.cut
    lo, hi = c.parts[first].start, c.parts[last - 1].stop
    states, copies = {}, []
    for name, t in segment.states.items():
        per = segment.per[name]
        if per == EACH:
            states[name] = t[first]
            copies += [(t[first], t[first + 1 : last])] if last - first > 1 else []
        else:
            states[name] = t[lo // per : hi // per]
    span = slice(c.span.start + lo, c.span.start + hi)
    parts = tuple(Part(p.name, p.start - lo, p.stop - lo) for p in c.parts[first:last])
    return Call(span, (hi - lo,), c.treatment, states, segment.per, parts, missed, tuple(copies))


if ALIGN % BLOCK:
    raise RuntimeError(f"shards start at multiples of {ALIGN}, which would cut blocks of {BLOCK}")
