"""A corpus: one flat array of bytes, read in place."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

Bytes = NDArray[np.uint8]

BYTE_VOCAB = 256
SEPARATOR = b"\0"
"""Stands between the files of a folder; text does not contain it."""

NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders of the standard library that are not its own sources."""


@dataclass(frozen=True)
class Corpus:
    """Text as tokens.

    tokens: uint8 [n], in memory or mapped from a file. name: for people. files: how many were joined.
    """

    tokens: Bytes
    name: str
    files: int
    vocab: int = BYTE_VOCAB

    def digest(self) -> int:
        """63-bit fingerprint of length and content (above 64 MiB: of 1024 evenly spread pieces)."""
        piece, count = 64 << 10, 1024
        hasher = hashlib.blake2b(len(self.tokens).to_bytes(8, "little"), digest_size=8)
        if len(self.tokens) <= piece * count:
            hasher.update(self.tokens.tobytes())
        else:
            for start in np.linspace(0, len(self.tokens) - piece, count, dtype=np.int64):
                hasher.update(self.tokens[start : start + piece].tobytes())
        return int.from_bytes(hasher.digest(), "little") >> 1


def open_corpus(path: str | None = None) -> Corpus:
    """The text file or folder at ``path``; without one, the standard library's sources."""
    if path is None:
        return library_corpus()
    place = Path(path).expanduser()
    if place.is_dir():
        return folder_corpus(place)
    if not place.is_file():
        raise ConfigError(f"data.path = {path!r} does not exist; give a text file or a folder of text files")
    if not place.stat().st_size:
        raise ConfigError(f"data.path = {path!r} is an empty file; give one with text")
    return Corpus(np.memmap(place, dtype=np.uint8, mode="r"), str(path), 1)


def library_corpus() -> Corpus:
    """Sources of the running Python's standard library: about 11 MB of text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in _walk(root, NOT_LIBRARY) if f.suffix == ".py")
    if not files:
        raise ConfigError(f"{root} holds no Python sources (a stripped or zipped Python); set data.path to a text file")
    return join(files, f"Python standard library ({root})")


def folder_corpus(root: Path) -> Corpus:
    """Every file below ``root`` except hidden ones, in sorted order."""
    files = sorted(f for f in _walk(root, frozenset()) if not f.name.startswith("."))
    if not files:
        raise ConfigError(f"data.path = {str(root)!r} is a folder without files; give a folder of text files")
    return join(files, str(root))


def join(files: Iterable[Path], name: str) -> Corpus:
    """The files one after the other, separated by a zero byte; raises ConfigError for one that is not text."""
    parts = []
    for file in files:
        try:
            part = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{file} of the data cannot be read: {error.strerror}") from None
        if SEPARATOR in part:
            raise ConfigError(f"{file} contains a zero byte and is not text; point data.path at text files only")
        parts.append(part)
    return Corpus(np.frombuffer(SEPARATOR.join(parts), dtype=np.uint8), name, len(parts))


def _walk(root: Path, without: frozenset[str]) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in without and not n.startswith(".")]
        yield from (Path(folder, f) for f in files)
