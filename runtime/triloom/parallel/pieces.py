"""The state of one rank as pieces of global tensors: what a checkpoint writes and reads.

A piece says which elements of which tensor a flat view of this rank's memory holds. Tensors are called
``state/parameter``: ``params/0.weight``, ``master/0.weight``, ``exp_avg/0.weight``; frozen parameters and persistent
buffers are ``fixed/...``. A state with an element for each of the parameter has the parameter's global shape, so its
pieces fit any mesh. Those that a block-wise rule keeps are cut in blocks of what a tensor-parallel rank holds: each
such part is a tensor of its own (``exp_avg/0.weight[0:0-12]``), which fits any mesh that splits the parameter alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..optim.base import BLOCK
from ..parts import Part, part_of
from ..shards import ShardSpec
from .bucket import BucketState
from .flat import Slot
from .segments import EACH, Segment
from .sharded import LocalParam, ShardedState


@dataclass(frozen=True, slots=True)
class StatePiece:
    """Elements ``part`` of a tensor of global ``shape``, in ``flat`` (contiguous, one dimension)."""

    tensor: str
    shape: tuple[int, ...]
    part: Part
    flat: torch.Tensor
    home: torch.Tensor | None = None
    """Where new values of ``flat`` belong, if it is a copy because its tensor is not contiguous."""
    every: bool = False
    """Every tp rank has the same, however the parameter is split."""


def written_pieces(state: ShardedState) -> Iterator[StatePiece]:
    """What this rank writes: over all ranks every element of every tensor once. Of what several ranks hold, each
    dp rank writes its shard; replicas over tp and over hybrid shards take turns by parameter."""
    turns = {name: turn for turn, name in enumerate(state.params)}
    for b in state.buckets:
        for slot, p, places in _slots(b, state):
            if p.tie is not None and p.tie.coords[0] != state.coord:
                continue
            copies = state.tp.size if p.spec.dim is None else 1
            number = state.replicas.rank + state.replicas.size * (state.tp.rank if copies > 1 else 0)
            if turns[slot.name] % (state.replicas.size * copies) != number:
                continue
            for piece in _of_slot(b, slot, p.spec, places, b.shard):
                if not piece.every or copies > 1 or state.tp.rank == 0:
                    yield piece


def held_pieces(state: ShardedState) -> Iterator[StatePiece]:
    """What this rank reads: its dp shard of the parameters, which :func:`spread` makes whole, and all of what it
    updates."""
    for b in state.buckets:
        for slot, p, places in _slots(b, state):
            yield from _of_slot(b, slot, p.spec, places, b.updates)


def spread(state: ShardedState) -> None:
    """After the shards of the parameters have new values: whole parameters get them too. Collective over dp."""
    for b in state.buckets:
        if not b.residency.params and state.dp.size > 1:
            state.dp.all_gather(b.params.tensor, b.param_shard).wait()


Places = list[tuple[Segment, int]]
"""The segments that hold states of a parameter, and its number in each."""


def _slots(b: BucketState, state: ShardedState) -> Iterator[tuple[Slot, LocalParam, Places]]:
    places: dict[str, Places] = {}
    for segment in b.segments:
        for number, part in enumerate(segment.cut.parts):
            places.setdefault(part.name, []).append((segment, number))
    for slot in b.bucket.slots:
        yield slot, state.params[slot.name], places.get(slot.name, [])


def _of_slot(b: BucketState, slot: Slot, spec: ShardSpec, places: Places, clip: slice) -> Iterator[StatePiece]:
    """Pieces of one parameter: of its value inside this dp rank's shard, of its states inside ``clip``."""
    yield from _elements("params", b.param_shard, b.shard.start, slot, spec, b.shard)
    if b.low is not None:
        yield from _elements("master", b.master, b.updates.start, slot, spec, clip)
    for segment, number in places:
        yield from _of_segment(b, segment, number, slot, spec, clip)


def _elements(
    kind: str, flat: torch.Tensor, origin: int, slot: Slot, spec: ShardSpec, clip: slice
) -> Iterator[StatePiece]:
    """flat: a state with an element for each of the bucket from ``origin`` on."""
    lo, hi = max(slot.offset, clip.start), min(slot.stop, clip.stop)
    if lo < hi:
        part = part_of(spec, lo - slot.offset, hi - slot.offset)
        yield StatePiece(f"{kind}/{slot.name}", spec.global_shape, part, flat[lo - origin : hi - origin])


def _of_segment(
    b: BucketState, segment: Segment, number: int, slot: Slot, spec: ShardSpec, clip: slice
) -> Iterator[StatePiece]:
    reach, origin = segment.cut.treatment.rule.reach, b.updates.start + segment.cut.span.start
    starts_here = clip.start <= slot.offset < clip.stop
    for kind, flat in segment.states.items():
        name, per = f"{kind}/{slot.name}", segment.per[kind]
        if reach is None and starts_here:
            yield _of_whole(name, flat, slot, spec)
        elif reach is not None and per == EACH and (starts_here or clip == b.updates):
            yield StatePiece(name, (), Part(0, 1), flat[number : number + 1], every=True)
        elif reach == 1 and per == 1:
            yield from _elements(kind, flat, origin, slot, spec, clip)
        elif reach is not None and per != EACH:
            yield from _blocks(name, flat, origin, slot, spec, clip, per)


def _of_whole(name: str, values: torch.Tensor, slot: Slot, spec: ShardSpec) -> StatePiece:
    """A state of a rule on whole tensors: one that has the parameter's shape is split like it, every tp rank has all
    of the others."""
    if tuple(values.shape) == slot.shape:
        return StatePiece(name, spec.global_shape, part_of(spec, 0, slot.numel), values.reshape(-1))
    return StatePiece(name, tuple(values.shape), Part(0, values.numel()), values.reshape(-1), every=True)


def _blocks(
    name: str, flat: torch.Tensor, origin: int, slot: Slot, spec: ShardSpec, clip: slice, per: int
) -> Iterator[StatePiece]:
    """Of a state with an element for each ``per`` of the parameter, up to the end of its last block."""
    room = -(-slot.numel // BLOCK) * BLOCK
    lo, hi = max(slot.offset, clip.start), min(slot.offset + room, clip.stop)
    if lo < hi:
        part = Part((lo - slot.offset) // per, (hi - slot.offset) // per)
        yield StatePiece(name + _suffix(spec), (room // per,), part, flat[(lo - origin) // per : (hi - origin) // per])


def _suffix(spec: ShardSpec) -> str:
    """Names the part of the parameter that blocks are cut from; empty for all of it."""
    whole = part_of(spec, 0, 0)
    if whole.dim is None:
        return ""
    return f"[{whole.dim}:{','.join(f'{lo}-{hi}' for lo, hi in whole.slices)}]"


def fixed_tensors(
    units: Mapping[str, nn.Module], canonical: Mapping[str, str], known: Collection[int] = ()
) -> Iterator[StatePiece]:
    """Frozen parameters and persistent buffers of this rank's units, by unit name; a storage that is used twice is
    given once. canonical: first name of each tied parameter, by its other names; known: ids of parameters that have
    state, though they are frozen now."""
    seen: set[int] = set()
    for unit, module in units.items():
        for prefix, owner in module.named_modules():
            own = {n: p for n, p in owner._parameters.items() if p is not None and id(p) not in known}
            frozen = {n: p for n, p in own.items() if not p.requires_grad}
            lasting = {
                n: t for n, t in owner._buffers.items() if t is not None and n not in owner._non_persistent_buffers_set
            }
            for local, tensor in (frozen | lasting).items():
                if id(tensor) in seen or not tensor.numel():
                    continue
                seen.add(id(tensor))
                name = ".".join(filter(None, (unit, prefix, local)))
                spec = getattr(owner, "shards", {}).get(local) or ShardSpec(tuple(tensor.shape))
                part = part_of(spec, 0, math.prod(tensor.shape))
                home = None if tensor.is_contiguous() else tensor.detach()
                flat = tensor.detach().reshape(-1)
                yield StatePiece(f"fixed/{canonical.get(name, name)}", spec.global_shape, part, flat, home)
