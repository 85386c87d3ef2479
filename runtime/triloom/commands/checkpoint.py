"""``triloom checkpoint``: what is in checkpoints, and whether they are whole."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.rules import suggest
from ..config.schema import Section
from ..errors import CheckpointError, ConfigError
from .convert import ConvertOptions, convert
from .options import describe, read

if TYPE_CHECKING:
    from ..checkpoint import Manifest

USAGE = """\
triloom checkpoint: look at checkpoints. FOLDER is one, a folder of some, or a run directory.

  triloom checkpoint inspect FOLDER      step, mesh, and what is stored, the newest one's
  triloom checkpoint verify FOLDER       read every byte of all of them against its checksum
  triloom checkpoint convert FROM TO     a checkpoint to a Hugging Face folder of a Llama or a GPT-2, or the reverse

The exit code of verify is 1 if one of them is damaged.

"""


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Section):
    """Options of ``triloom checkpoint inspect``."""

    tensors: bool = False
    """List every tensor."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Section):
    """Options of ``triloom checkpoint verify``."""

    newest: bool = False
    """The newest one only."""


def run_checkpoint(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE + "".join(f"{name}:\n{describe(a.options)}" for name, a in ACTIONS.items()), end="")
        return 0 if words else 2
    action = ACTIONS.get(words[0])
    if action is None:
        near = suggest(words[0], ACTIONS)
        raise ConfigError(f"triloom checkpoint knows {', '.join(ACTIONS)}, got {words[0]!r}{near}")
    options, places = read(action.options, words[1:])
    try:
        return action.run(options, places)
    except CheckpointError as error:
        print(f"triloom: {error}", file=sys.stderr)
        return 1


def checkpoints_at(places: Sequence[str]) -> list[Path]:
    """The checkpoints at the one place given, oldest first. Raises ConfigError if there are none."""
    from ..checkpoint import found, path_of
    from ..checkpoint.manifest import NAME

    if len(places) != 1:
        raise ConfigError(f"triloom checkpoint takes one folder, got {' '.join(places) or 'nothing'}")
    place = Path(places[0]).expanduser()
    if (place / NAME).exists():
        return [place]
    for folder in (place, place / "checkpoints"):
        if steps := found(folder):
            return [path_of(folder, step) for step in steps]
    raise ConfigError(f"{places[0]!r} is no checkpoint and holds none; give a checkpoint, a folder of them, or a run")


def inspect(options: InspectOptions, places: Sequence[str]) -> int:
    """``triloom checkpoint inspect``."""
    from ..checkpoint import read_manifest

    folders = checkpoints_at(places)
    manifest = read_manifest(folders[-1])
    about = describe_manifest(manifest, tensors=options.tensors)
    others = [f.name for f in folders[:-1]]
    if options.json:
        print(json.dumps({"folder": str(folders[-1]), "others": others, **about}))
    else:
        print("\n".join([str(folders[-1]), *_text(about), *([f"also {', '.join(others)}"] if others else [])]))
    return 0


def describe_manifest(manifest: Manifest, *, tensors: bool) -> dict[str, Any]:
    """What a manifest says, as JSON."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    dtypes: dict[str, list[str]] = {}
    for name, tensor in sorted(manifest.tensors.items()):
        kind = name.partition("/")[0]
        count[kind] += 1
        size[kind] += tensor.nbytes
        if tensor.dtype not in dtypes.setdefault(kind, []):
            dtypes[kind].append(tensor.dtype)
    about: dict[str, Any] = {
        "step": manifest.step,
        "mesh": dict(manifest.mesh),
        "model": manifest.model,
        "bytes": manifest.nbytes,
        "files": {name: file.bytes for name, file in manifest.files.items()},
        "states": {k: {"tensors": count[k], "bytes": size[k], "dtypes": dtypes[k]} for k in count},
        "engine": dict(manifest.state),
        "extra": dict(manifest.extra),
    }
    if tensors:
        about["tensors"] = {
            n: {"dtype": t.dtype, "shape": list(t.shape), "pieces": len(t.pieces)} for n, t in manifest.tensors.items()
        }
    return about


def _text(about: Mapping[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis}={size}" for axis, size in about["mesh"].items())
    state, extra = about["engine"], about["extra"]
    lines = [
        f"after {about['step']} updates on {mesh}, {_mib(about['bytes'])} in {len(about['files'])} files, "
        f"model {about['model']}",
        f"seed {state['seed']}, loss scale {state['scaling']['scale']:g}"
        + (f", next sample {extra['samples']}" if "samples" in extra else ""),
    ]
    for kind, row in about["states"].items():
        lines.append(f"  {kind:16} {row['tensors']:5} tensors {_mib(row['bytes']):>12}  {' '.join(row['dtypes'])}")
    for name, t in about.get("tensors", {}).items():
        lines.append(f"  {name}  {t['dtype']} {t['shape']} in {t['pieces']} pieces")
    return lines


def verify(options: VerifyOptions, places: Sequence[str]) -> int:
    """``triloom checkpoint verify``."""
    from ..checkpoint import verify as verify_one

    damaged = 0
    for folder in checkpoints_at(places)[-1 if options.newest else 0 :]:
        begin = time.perf_counter()
        try:
            manifest = verify_one(folder)
        except CheckpointError as error:
            damaged += 1
            print(f"{folder}: DAMAGED: {error}", flush=True)
        else:
            print(f"{folder}: whole, {_mib(manifest.nbytes)} in {time.perf_counter() - begin:.1f} s", flush=True)
    return int(damaged > 0)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Action:
    """A word after ``triloom checkpoint``."""

    options: type[Section]
    run: Callable[[Any, Sequence[str]], int]


ACTIONS: Mapping[str, Action] = {
    "inspect": Action(InspectOptions, inspect),
    "verify": Action(VerifyOptions, verify),
    "convert": Action(ConvertOptions, convert),
}
