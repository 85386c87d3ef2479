"""Loading a checkpoint into an engine, on whatever mesh it was written.

First every rank reads what it needs into host memory and checks it; only when all have it is the engine changed. So a
checkpoint that is damaged, or of another model, leaves the engine as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from .read import Want, read, read_manifest

if TYPE_CHECKING:
    from ..engine import Engine


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

    Reads what this rank needs and no more; needs as much host memory besides. Raises CheckpointError on every rank,
    and leaves the engine as it was, if a file is damaged or the checkpoint is of another model.
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

    def fetch() -> list[Want]:
        wants = [Want(p.tensor, p.part, torch.empty(p.part.numel, dtype=p.flat.dtype)) for p in [*pieces, *own]]
        read(folder, manifest, wants)
        return wants

    wants = together(world, fetch, CheckpointError)
    for piece, want in zip(pieces, wants, strict=False):
        piece.flat.copy_(want.into)
        if piece.home is not None:
            piece.home.copy_(piece.flat.view(piece.home.shape))
    content.set_own(engine, {p.tensor: w.into for p, w in zip(own, wants[len(pieces) :], strict=True)})
    for bucket in engine.state.buckets:
        bucket.calls = None  # they depend on single numbers among the states
    spread(engine.state)
    content.set_numbers(engine, manifest.state)
    return Restored(folder, manifest.step, manifest.extra, tuple(_notes(engine, manifest, same_layout)))


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
