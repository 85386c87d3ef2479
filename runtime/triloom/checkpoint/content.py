"""What of an engine is in a checkpoint: the pieces of this rank, and the numbers besides.

Tensors that fit any mesh come from ``parallel.pieces``. Two kinds belong to one rank and are read again only where the
layout is the same: what a compressed reduction has not sent yet (``feedback/...``), and the state of torch's own
generators (``rng/...``; triloom's draws are functions of seed, step and sample and need none).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch

from ..parallel.pieces import StatePiece, fixed_tensors, held_pieces, written_pieces
from ..parts import Part
from ..scaling import ScalingState
from .disk import crc32c
from .manifest import DTYPES, Tensor

if TYPE_CHECKING:
    from ..engine import Engine

OWN = ("feedback/", "rng/")
"""Beginnings of the names of what belongs to one rank."""


def written(engine: Engine) -> list[StatePiece]:
    """What this rank writes."""
    out = list(written_pieces(engine.state))
    if engine.groups.axis("dp").rank == 0:
        tp = engine.groups.axis("tp").rank
        out += [p for p in _fixed(engine) if p.part.dim is not None or tp == 0]
    return out + own_pieces(engine)


def held(engine: Engine) -> list[StatePiece]:
    """What this rank must find in a checkpoint, on whatever mesh that was written."""
    return [*held_pieces(engine.state), *_fixed(engine)]


def own_pieces(engine: Engine) -> list[StatePiece]:
    """What belongs to this rank alone."""
    rank = engine.world.rank
    out = [
        _own(f"feedback/{key}/bucket{b.bucket.index}/rank{rank}", values)
        for b in engine.state.buckets
        for key, values in sorted(b.memory.items())
    ]
    out.append(_own(f"rng/cpu/rank{rank}", torch.get_rng_state()))
    if engine.scope.device.type == "cuda":
        out.append(_own(f"rng/cuda/rank{rank}", torch.cuda.get_rng_state(engine.scope.device)))
    return out


def _own(name: str, values: torch.Tensor) -> StatePiece:
    return StatePiece(name, (values.numel(),), Part(0, values.numel()), values.reshape(-1))


def blank(name: str, tensor: Tensor) -> StatePiece:
    """A piece to read such a tensor into."""
    dtype: torch.dtype = getattr(torch, DTYPES[tensor.dtype][0])
    return _own(name, torch.empty(tensor.shape, dtype=dtype))


def set_own(engine: Engine, found: Mapping[str, torch.Tensor]) -> None:
    """Put back what belonged to this rank, by the names of :func:`own_pieces`."""
    rank = engine.world.rank
    for b in engine.state.buckets:
        b.memory.clear()
    for name, values in found.items():
        kind, key, *place = name.split("/")
        if kind == "feedback":
            bucket = int(place[0].removeprefix("bucket"))
            engine.state.buckets[bucket].memory[key] = values.to(engine.scope.device)
    if f"rng/cpu/rank{rank}" in found:
        torch.set_rng_state(found[f"rng/cpu/rank{rank}"])
    if f"rng/cuda/rank{rank}" in found and engine.scope.device.type == "cuda":
        torch.cuda.set_rng_state(found[f"rng/cuda/rank{rank}"], engine.scope.device)


def _fixed(engine: Engine) -> list[StatePiece]:
    names = list(engine.named)
    canonical = {name: tie.names[0] for tie in engine.ties for name in tie.names}
    units = {names[u]: m for u, m in sorted(engine.modules.items())}
    return list(fixed_tensors(units, canonical, {param for _, param in engine.state.uses}))


def layout_print(engine: Engine) -> int:
    """Fingerprint of the mesh and of the flat layout of this rank's memory."""
    layout = [str(engine.mesh), engine.world.rank, [repr(b.bucket) for b in engine.state.buckets]]
    return crc32c(json.dumps(layout).encode())


def model_print(tensors: Mapping[str, Tensor]) -> str:
    """Fingerprint of the names, shapes and dtypes of all that does not belong to one rank."""
    rows = [[n, t.dtype, list(t.shape)] for n, t in sorted(tensors.items()) if not n.startswith(OWN)]
    return blake2b(json.dumps(rows).encode(), digest_size=8).hexdigest()


def numbers(engine: Engine) -> dict[str, Any]:
    """What the engine needs besides tensors, of this rank: equal on all but for ``missed``, which is of the
    parameters that a rank has."""
    return {
        "steps": engine.steps,
        "scaling": asdict(engine.totals.scaling),
        "seed": engine.scope.seed,
        "missed": {name: count for name, count in engine.state.missed.items() if count},
    }


def set_numbers(engine: Engine, state: Mapping[str, Any]) -> None:
    """Put them back; a seed is the engine's own."""
    engine.steps = int(state["steps"])
    engine.totals.scaling = ScalingState(**state["scaling"])
    engine.state.missed.clear()
    engine.state.missed.update({n: int(c) for n, c in state["missed"].items() if n in engine.state.params})
