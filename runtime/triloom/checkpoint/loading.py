"""Loading a checkpoint into an engine, on whatever mesh it was written.

First every rank reads and checks all that it needs, and keeps nothing; only when every rank has found it good is it
read again, into the engine. So a checkpoint that is damaged, or of another model, leaves the engine as it was, without
memory for a second copy of the state. Fresh memory would cost more than the second reading, from the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..groups.objects import gather_objects
from ..parallel.pieces import StatePiece, spread
from ..together import agree_on, together
from . import content
from .manifest import CODES, Manifest
from .read import Want, check, read, read_manifest

if TYPE_CHECKING:
    from ..engine import Engine


VIA_HOST = 256 << 20
"""Bytes that are in host memory at a time on their way to a device."""


@dataclass(frozen=True)
class Restored:
    """What load found besides the state."""

    folder: Path
    step: int
    """Updates that had been made."""
    extra: Mapping[str, Any]
    """What was handed to save."""
    notes: tuple[str, ...]
    """What could not be taken over, and what that means."""


def load(engine: Engine, folder: str | Path) -> Restored:
    """Set all of the engine's state to that of a checkpoint; collective, between steps.

    Reads what this rank needs and no more. Raises CheckpointError on every rank, and leaves the engine as it was, if a
    file is damaged or the checkpoint is of another model.
    """
    folder = Path(folder)
    world = engine.world
    manifest = together(world, lambda: read_manifest(folder), CheckpointError)
    agree_on(world, {"the checkpoint": f"{folder.name}, step {manifest.step}, model {manifest.model}"},
             "all ranks must see the same folder")  # fmt: skip
    pieces = content.held(engine)
    same_layout = _same_layout(engine, manifest)
    own = _own_tensors(engine, manifest) if same_layout else []
    together(world, lambda: _check(pieces, manifest), CheckpointError)
    _check_complete(engine, pieces, manifest)

    wanted = [*pieces, *own]
    together(world, lambda: check(folder, manifest, [(p.tensor, p.part) for p in wanted]), CheckpointError)
    together(world, lambda: _fill(folder, manifest, wanted), CheckpointError)
    content.set_own(engine, {p.tensor: p.flat for p in own})
    for bucket in engine.state.buckets:
        bucket.calls = None  # they depend on single numbers among the states
    spread(engine.state)
    content.set_numbers(engine, manifest.state)
    return Restored(folder, manifest.step, manifest.extra, tuple(_notes(engine, manifest, same_layout)))


def _fill(folder: Path, manifest: Manifest, pieces: Sequence[StatePiece]) -> None:
    """Those on the host in place, those of a device by way of the host, some at a time."""
    read(folder, manifest, [Want(p.tensor, p.part, p.flat) for p in pieces if p.flat.device.type == "cpu"])
    for some in _batches([p for p in pieces if p.flat.device.type != "cpu"]):
        wants = [Want(p.tensor, p.part, torch.empty(p.part.numel, dtype=p.flat.dtype)) for p in some]
        read(folder, manifest, wants)
        for piece, want in zip(some, wants, strict=True):
            piece.flat.copy_(want.into)
    for piece in pieces:
        if piece.home is not None:
            piece.home.copy_(piece.flat.view(piece.home.shape))


def _batches(pieces: Sequence[StatePiece]) -> Iterator[list[StatePiece]]:
    """Runs of at least one piece, and otherwise at most VIA_HOST bytes."""
    some: list[StatePiece] = []
    for piece in pieces:
        if some and sum(p.flat.nbytes for p in some) + piece.flat.nbytes > VIA_HOST:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def _same_layout(engine: Engine, manifest: Manifest) -> bool:
    """Whether every rank's memory is laid out as that of the rank that wrote."""
    rank, world = engine.world.rank, engine.world
    alike = len(manifest.layouts) == world.size and manifest.layouts[rank] == content.layout_print(engine)
    return all(gather_objects(world, alike))


def _own_tensors(engine: Engine, manifest: Manifest) -> list[StatePiece]:
    """What belongs to this rank alone, as the checkpoint has it."""
    end = f"/rank{engine.world.rank}"
    names = [n for n in manifest.tensors if n.startswith(content.OWN) and n.endswith(end)]
    return [content.blank(n, manifest.tensors[n]) for n in names]


def _check(pieces: Sequence[StatePiece], manifest: Manifest) -> None:
    """Raise CheckpointError unless the checkpoint has every tensor that is needed, alike."""
    problems: list[str] = []
    for p in pieces:
        there = manifest.tensors.get(p.tensor)
        dtype = CODES[str(p.flat.dtype).removeprefix("torch.")]
        if there is None:
            problems.append(f"it holds no {p.tensor}{_near(p.tensor, manifest)}")
        elif (there.dtype, there.shape) != (dtype, p.shape):
            problems.append(f"{p.tensor} is {there.dtype} {list(there.shape)} there and {dtype} {list(p.shape)} here")
    problems = list(dict.fromkeys(problems))
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} does not fit this model and optimizer: {shown}; "
            "nothing was changed"
        )


def _near(name: str, manifest: Manifest) -> str:
    """What else there is of the same state of the same parameter: blocks of another split."""
    plain = name.partition("[")[0]
    other = [n for n in manifest.tensors if n.partition("[")[0] == plain]
    if not other:
        return ""
    tp = manifest.mesh.get("tp", 1)
    return f" but {other[0]}: blocks of a state fit only the split over tp they were cut for, which was tp={tp}"


def _check_complete(engine: Engine, pieces: Sequence[StatePiece], manifest: Manifest) -> None:
    """Raise CheckpointError if the checkpoint has something that no rank wants: it is of a larger model."""
    names = sorted(n for n in manifest.tensors if not n.startswith(content.OWN))
    place = {n: i for i, n in enumerate(names)}
    wanted = torch.zeros(len(names), dtype=torch.int64)
    wanted[[place[p.tensor] for p in pieces]] = 1
    engine.world.all_reduce(wanted, "max").wait()
    spare = [n for n, used in zip(names, wanted.tolist(), strict=True) if not used]
    if spare:
        more = f" and {len(spare) - 4} more" if len(spare) > 4 else ""
        raise CheckpointError(
            f"the checkpoint of step {manifest.step} does not fit this model and optimizer: it also holds "
            f"{', '.join(spare[:4])}{more}; nothing was changed"
        )


def _notes(engine: Engine, manifest: Manifest, same_layout: bool) -> list[str]:
    notes = []
    if manifest.state["seed"] != engine.scope.seed:
        notes.append(f"the seed is {engine.scope.seed}, it was {manifest.state['seed']}: dropout draws other elements")
    if not same_layout and any(n.startswith("feedback/") for n in manifest.tensors):
        notes.append(
            "what the compressed reduction had not sent yet belongs to the mesh it was saved on, and was dropped"
        )
    return notes
