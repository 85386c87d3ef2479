"""A Hugging Face folder: config.json and safetensors, one file or several with an index. No pickle is ever read.

The format (https://github.com/huggingface/safetensors): 8 bytes little-endian length, so many bytes of JSON that
map each name to dtype, shape and half-open byte range behind it, then the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}

INDEX, ONE = "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 5 << 30
"""Bytes of tensors in one file of a written folder."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""

    def read(self, rows: tuple[int, int], cols: tuple[int, int] | None = None) -> torch.Tensor:
        """Rows (dim 0) and, of a matrix, columns; a copy, of which only the pages needed are read."""
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = np.memmap(self.path, np.uint8, "r", self.start, (size,)) if size else np.empty(0, np.uint8)
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        part = raw.reshape(self.shape[0], width)[rows[0] : rows[1]]
        if cols is not None:
            part = part[:, cols[0] * self.dtype.itemsize : cols[1] * self.dtype.itemsize]
        values = torch.from_numpy(np.ascontiguousarray(part).copy()).view(self.dtype)
        return values if len(self.shape) > 1 else values.reshape(-1)


@dataclass(frozen=True)
class Folder:
    """What a folder holds."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]


def open_folder(path: str | Path) -> Folder:
    """Read config.json and the headers of the tensor files; raises ConfigError naming what is missing or damaged."""
    folder = Path(path).expanduser()
    config = _json(folder / "config.json", f"{folder} is not a Hugging Face folder")
    tensors: dict[str, Stored] = {}
    for file in _files(folder):
        tensors |= read_header(file)
    return Folder(folder, config, tensors)


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        places = _json(folder / INDEX, "the index is damaged").get("weight_map", {})
        names = sorted(set(places.values()))
        if any(Path(name).name != name for name in names):
            raise ConfigError(f"{folder / INDEX} points outside its folder: {names}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; fetch the folder again")
        return [folder / name for name in names]
    if (folder / ONE).is_file():
        return [folder / ONE]
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {pickled[0]} is pickled, which is not read: save it with safe_serialization=True" if pickled else ""
    raise ConfigError(f"{folder} has neither {ONE} nor {INDEX}{hint}")


def _json(path: Path, otherwise: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{otherwise}: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{otherwise}: {path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{otherwise}: {path} is not a JSON object")
    return value


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, by name; those of other than floating-point dtypes are left out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ConfigError(f"{path} is not a safetensors file: a header of {length} bytes in {size}")
        try:
            header = json.loads(file.read(length))
            entries = {n: e for n, e in header.items() if n != "__metadata__" and e["dtype"] in DTYPES}
            found = {n: _stored(path, e, 8 + length) for n, e in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} has a damaged header: {error!r}") from None
    short = [n for n, e in entries.items() if 8 + length + e["data_offsets"][1] > size]
    if short:
        raise ConfigError(f"{path} is cut off: {short[0]} ends behind its {size} bytes; fetch it again")
    return found


def _stored(path: Path, entry: Mapping[str, Any], origin: int) -> Stored:
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
    start, stop = entry["data_offsets"]
    if min(shape, default=1) < 0 or start < 0 or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{entry} does not fit together")
    return Stored(path, dtype, shape, origin + start)


# ---------------------------------------------------------------- writing


Shapes = Mapping[str, tuple[int, ...]]


def check_target(path: str | Path) -> Path:
    """The folder to write to; raises ConfigError for one that holds something."""
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; give another one")
    return folder


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the tensors, which come in any order and are held one at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    parts = _split(list(shapes), size, shard_bytes)
    count = len(parts)
    names = [ONE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    places: dict[str, tuple[Path, int]] = {}
    for name, part in zip(names, parts, strict=True):
        places |= _begin_file(folder / name, {n: shapes[n] for n in part}, dtype)
    written = set()
    for name, tensor in tensors:
        path, start = places[name]
        if tuple(tensor.shape) != shapes[name]:
            raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, {shapes[name]} was announced")
        data = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data.tobytes())
        written.add(name)
    if missing := sorted(set(shapes) - written):
        raise ConfigError(f"{missing[0]} and {len(missing) - 1} other tensors were not given")
    if count > 1:
        where = {n: file for file, part in zip(names, parts, strict=True) for n in part}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")


def _split(names: Sequence[str], size: Mapping[str, int], most: int) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if parts[-1] and filled + size[name] > most:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += size[name]
    return parts


def _begin_file(path: Path, shapes: Shapes, dtype: torch.dtype) -> dict[str, tuple[Path, int]]:
    """A file of the right size with its header; where each tensor goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return {name: (path, 8 + len(text) + header[name]["data_offsets"][0]) for name in shapes}
