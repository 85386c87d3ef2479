"""Tokenised text on disk: a folder per text and tokenizer, named by the hash of both.

A folder is written under another name and renamed when it is complete, so that it is there whole or not at all,
whoever else writes the same one. ``tokens.bin`` is a flat file of token ids; ``manifest.json`` says how many, of
which dtype and with which CRC-32.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np

from ..errors import ConfigError
from .text import Text
from .tokenizers import Tell, Tokenizer
from .tokens import Flat

FORMAT = 1
TOKENS, MANIFEST = "tokens.bin", "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What a folder of the cache holds."""

    format: int
    dtype: str
    tokens: int
    crc32: int
    text: str
    """Name of the text, for people."""
    tokenizer: str


def key_of(*parts: object) -> str:
    """Name of a folder: a hash of everything that its content depends on."""
    return hashlib.blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=16).hexdigest()


def write_tokens(folder: Path, key: str, text: Text, tokenizer: Tokenizer, tell: Tell) -> None:
    """Tokenise ``text`` into ``folder/key``. Raises ConfigError where one cannot be written or the other read."""
    with _whole(folder, key) as part:
        crc = count = 0
        dtype = ""
        with (part / TOKENS).open("wb") as file:
            for ids in tokenizer.encode(text, tell):
                data = np.ascontiguousarray(ids).data
                crc, count, dtype = zlib.crc32(data, crc), count + len(ids), ids.dtype.str
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not count:
            raise ConfigError(f"{text.name} holds no token; give files with text")
        _write_json(part, Manifest(FORMAT, dtype, count, crc, text.name, tokenizer.name))


def write_file(folder: Path, key: str, name: str, content: str) -> None:
    """Keep a text file, a tokenizer's, as ``folder/key/name``, with its CRC-32 beside it."""
    with _whole(folder, key) as part:
        (part / name).write_text(content, encoding="utf-8")
        (part / f"{name}.crc32").write_text(f"{zlib.crc32(content.encode()):08x}\n", encoding="utf-8")


def read_file(folder: Path, key: str, name: str) -> str | None:
    """What :func:`write_file` kept, None if it is not there or not as it was written."""
    place = folder / key / name
    try:
        content = place.read_text(encoding="utf-8")
        wanted = (folder / key / f"{name}.crc32").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return content if f"{zlib.crc32(content.encode()):08x}" == wanted else None


def read_tokens(folder: Path, key: str) -> Flat:
    """The tokens of ``folder/key``, mapped. Raises ConfigError, with the way out, where they are not as written."""
    place = folder / key
    try:
        manifest = Manifest(**json.loads((place / MANIFEST).read_text(encoding="utf-8")))
        array = np.memmap(place / TOKENS, dtype=manifest.dtype, mode="r")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{place} is not a folder of tokenised text any more ({error}); remove it") from None
    if len(array) != manifest.tokens:
        raise ConfigError(f"{place / TOKENS} has {len(array)} tokens, not {manifest.tokens}; remove {place}")
    return Flat(array)


def is_intact(folder: Path, key: str) -> bool:
    """Whether ``folder/key`` holds the tokens that were written. Reads all of them (1 GB/s)."""
    try:
        array = read_tokens(folder, key).array
        manifest = json.loads((folder / key / MANIFEST).read_text(encoding="utf-8"))
    except ConfigError:
        return False
    crc = 0
    for start in range(0, len(array), 1 << 22):
        crc = zlib.crc32(np.ascontiguousarray(array[start : start + (1 << 22)]).data, crc)
    return bool(crc == manifest["crc32"])


def clear(folder: Path, key: str) -> None:
    """Remove ``folder/key``."""
    shutil.rmtree(folder / key, ignore_errors=True)


@contextmanager
def _whole(folder: Path, key: str) -> Iterator[Path]:
    """A folder to write into that becomes ``folder/key`` if nothing goes wrong, and else disappears."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{key}.{uuid4().hex}"
        part.mkdir()
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; give another folder (data.cache)") from None
    try:
        yield part
        try:
            part.rename(folder / key)
        except OSError:
            if not (folder / key).is_dir():  # another process was first, with the same content
                raise
    except OSError as error:
        free = shutil.disk_usage(folder).free
        raise ConfigError(
            f"{folder / key} cannot be written: {error.strerror}, {free:,} bytes are free; give another folder "
            "(data.cache)"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_json(folder: Path, manifest: Manifest) -> None:
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
