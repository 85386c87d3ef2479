"""What a checkpoint holds and where: ``manifest.json``. Pure.

A checkpoint is a folder with one safetensors file for each rank that wrote something and this manifest, which
says of every global tensor in which files its pieces lie and which of its elements they are. The manifest carries
a CRC32C of itself and of every byte of the files. Version 1::

    {"format": "triloom checkpoint", "version": 1, "step": 10, "mesh": {"dp": 2, "pp": 1, "tp": 2},
     "model": "5f0c...", "layouts": [...], "state": {...}, "extra": {...}, "block": 4194304,
     "files": {"rank-00000.safetensors": {"bytes": 8192, "header": 4096, "crc32c": 123}},
     "tensors": {"params/0.weight": {"dtype": "F32", "shape": [4, 8], "pieces": [
         {"file": "rank-00000.safetensors", "offset": 4096, "bytes": 64, "start": 0, "stop": 16,
          "dim": 0, "slices": [[0, 2]], "crc32c": [77]}]}},
     "crc32c": 99}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..parts import Part, local_shape

NAME = "manifest.json"
FORMAT, VERSION = "triloom checkpoint", 1
BLOCK = 4 << 20
"""Bytes of a piece behind one checksum: what is read at least to be sure of a part of a piece."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
"""Name in safetensors -> torch's name and bytes of an element."""
CODES: Mapping[str, str] = {torch_name: code for code, (torch_name, _) in DTYPES.items()}

Checksum = Callable[[bytes], int]
"""CRC32C."""

_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True, slots=True)
class Stored:
    """A piece of a tensor in a file."""

    file: str
    offset: int
    """Of its first byte in the file."""
    part: Part
    checksums: tuple[int, ...]
    """CRC32C of each block of BLOCK bytes, the last one shorter."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A global tensor."""

    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]
    pieces: tuple[Stored, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype][1]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class File:
    """A safetensors file of the folder."""

    bytes: int
    header: int
    """Bytes before the data."""
    checksum: int
    """CRC32C of the header."""


@dataclass(frozen=True)
class Manifest:
    """A whole checkpoint."""

    step: int
    """Updates that were made."""
    mesh: Mapping[str, int]
    model: str
    """Fingerprint of the names, shapes and dtypes of the parameters, and of the rules that update them."""
    layouts: tuple[int, ...]
    """By rank, a fingerprint of how its memory is laid out, for what only makes sense there."""
    state: Mapping[str, Any]
    """What the engine needs besides tensors."""
    extra: Mapping[str, Any]
    """What the caller of save handed over."""
    files: Mapping[str, File]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(f.bytes for f in self.files.values())


def block_sizes(nbytes: int) -> list[int]:
    """Bytes of each block of a piece."""
    return [min(BLOCK, nbytes - at) for at in range(0, nbytes, BLOCK)]


# ---------------------------------------------------------------- JSON


def piece_json(piece: Stored, itemsize: int) -> dict[str, Any]:
    p = piece.part
    split = {} if p.dim is None else {"dim": p.dim, "slices": [list(s) for s in p.slices]}
    place = {"file": piece.file, "offset": piece.offset, "bytes": p.numel * itemsize, "start": p.start, "stop": p.stop}
    return {**place, **split, "crc32c": list(piece.checksums)}


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    pieces = [piece_json(p, tensor.itemsize) for p in tensor.pieces]
    return {"dtype": tensor.dtype, "shape": list(tensor.shape), "pieces": pieces}


def to_text(manifest: Manifest, checksum: Checksum) -> str:
    """The file's text."""
    m = manifest
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": m.step,
        "mesh": dict(m.mesh),
        "model": m.model,
        "layouts": list(m.layouts),
        "state": dict(m.state),
        "extra": dict(m.extra),
        "block": BLOCK,
        "files": {n: {"bytes": f.bytes, "header": f.header, "crc32c": f.checksum} for n, f in m.files.items()},
        "tensors": {name: _tensor_json(t) for name, t in m.tensors.items()},
    }
    return json.dumps({**content, "crc32c": checksum(_canonical(content))}, separators=(",", ":")) + "\n"


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def from_text(text: str, checksum: Checksum) -> Manifest:
    """Raises CheckpointError for anything but an intact manifest of a version this program knows."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{NAME} is not JSON ({error}): it is damaged or incomplete") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{NAME} does not say that it is a {FORMAT}")
    if content.get("version") != VERSION:
        raise CheckpointError(f"{NAME} has version {content.get('version')!r}, this program reads version {VERSION}")
    said = content.pop("crc32c", None)
    if said != checksum(_canonical(content)):
        raise CheckpointError(f"{NAME} does not match its checksum: it is damaged, or was edited by hand")
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{NAME} is not a manifest of version {VERSION}: {error!r}") from None


def _parse(c: Mapping[str, Any]) -> Manifest:
    if c["block"] != BLOCK:
        raise ValueError(f"blocks of {c['block']} bytes, not {BLOCK}")
    files = {n: File(int(f["bytes"]), int(f["header"]), int(f["crc32c"])) for n, f in c["files"].items()}
    for name in files:
        if not _FILE.fullmatch(name):
            raise ValueError(f"file name {name!r}")
    tensors = {name: _parse_tensor(name, t, files) for name, t in c["tensors"].items()}
    return Manifest(
        step=int(c["step"]),
        mesh={str(k): int(v) for k, v in c["mesh"].items()},
        model=str(c["model"]),
        layouts=tuple(int(v) for v in c["layouts"]),
        state=dict(c["state"]),
        extra=dict(c["extra"]),
        files=files,
        tensors=tensors,
    )


def _parse_tensor(name: str, t: Mapping[str, Any], files: Mapping[str, File]) -> Tensor:
    shape = tuple(int(n) for n in t["shape"])
    itemsize = DTYPES[t["dtype"]][1]
    pieces = tuple(_parse_piece(p) for p in t["pieces"])
    for stored, p in zip(pieces, t["pieces"], strict=True):
        part, file = stored.part, files[stored.file]
        size = part.numel * itemsize
        inside = _inside(shape, part)
        placed = file.header <= stored.offset and stored.offset + size <= file.bytes
        if not (inside and placed and p["bytes"] == size and len(stored.checksums) == len(block_sizes(size))):
            raise ValueError(f"a piece of {name} that does not fit: {p}")
    if sum(p.part.numel for p in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} are not all of it")
    return Tensor(t["dtype"], shape, pieces)


def _inside(shape: tuple[int, ...], part: Part) -> bool:
    """Whether a tensor of that shape has the part."""
    if part.dim is not None:
        axis = shape[part.dim] if 0 <= part.dim < len(shape) else 0
        if not all(0 <= lo < hi <= axis for lo, hi in part.slices):
            return False
    return 0 <= part.start <= part.stop <= math.prod(local_shape(shape, part))


def _parse_piece(p: Mapping[str, Any]) -> Stored:
    slices = tuple((int(lo), int(hi)) for lo, hi in p.get("slices", ()))
    dim = None if p.get("dim") is None else int(p["dim"])
    part = Part(int(p["start"]), int(p["stop"]), dim, slices)
    return Stored(str(p["file"]), int(p["offset"]), part, tuple(int(v) for v in p["crc32c"]))


# ---------------------------------------------------------------- from what the ranks wrote


def merge(parts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, File], dict[str, Tensor]]:
    """Files and tensors of all ranks, from what each says of its own (as JSON: see ``saving``). A piece that two
    ranks wrote counts once. Raises CheckpointError if a tensor is not complete or ranks disagree on its shape."""
    files: dict[str, File] = {}
    found: dict[str, tuple[str, tuple[int, ...], dict[Part, Stored]]] = {}
    for one in parts:
        if not one["tensors"]:
            continue
        files[one["file"]] = File(one["bytes"], one["header"], one["crc32c"])
        for name, dtype, shape, piece in one["tensors"]:
            kind = (dtype, tuple(shape))
            known = found.setdefault(name, (*kind, {}))
            if known[:2] != kind:
                raise CheckpointError(f"ranks disagree on {name}: {known[0]} {list(known[1])} and {dtype} {shape}")
            stored = _parse_piece({**piece, "file": one["file"]})
            known[2].setdefault(stored.part, stored)
    tensors = {}
    for name in sorted(found):
        dtype, shape, pieces = found[name]
        tensors[name] = Tensor(dtype, shape, tuple(pieces.values()))
        have = sum(p.numel for p in pieces)
        if have != math.prod(shape):
            raise CheckpointError(f"{name} of shape {list(shape)} is not complete: the ranks wrote {have} elements")
    return files, tensors
