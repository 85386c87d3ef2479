"""Text on disk: which files a path stands for, and their content in pieces."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import ConfigError
from .tokens import Flat

SEPARATOR = b"\0"
"""Stands between the files of a folder; text does not contain it."""

NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders of the standard library that are not its own sources."""

CHUNK = 1 << 20
"""Bytes of text that are looked at together."""


@dataclass(frozen=True)
class Text:
    """Text files, one after the other. name: for people. folder: whether a separator stands between files."""

    files: tuple[Path, ...]
    name: str
    folder: bool

    def size(self) -> int:
        """Bytes of all files, without separators."""
        return sum(_size(file) for file in self.files)

    def as_bytes(self) -> Flat:
        """Its bytes as tokens: a single file mapped, a folder's files joined in memory, a zero byte between two.

        Raises ConfigError for a file of a folder that contains a zero byte.
        """
        if not self.folder:
            return Flat(np.memmap(self.files[0], dtype=np.uint8, mode="r"))
        return Flat(np.frombuffer(SEPARATOR.join(_part(file) for file in self.files), dtype=np.uint8))

    def pieces(self) -> Iterator[tuple[str, int, bool]]:
        """Its content in order: text, the bytes that it was, and whether a file ends here.

        Pieces end at the end of a line where a line ends within ``CHUNK``. Raises ConfigError, naming file and
        byte, where a file is not UTF-8.
        """
        for file in self.files:
            yield from _file_pieces(file)


def find_text(path: str | None, key: str) -> Text:
    """The text file or folder at ``path``; without one, the standard library's sources."""
    if path is None:
        return library()
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(f for f in _walk(place, frozenset()) if not f.name.startswith("."))
        if not files:
            raise ConfigError(f"{key} = {path!r} is a folder without files; give a folder of text files")
        return Text(tuple(files), path, True)
    if not place.is_file():
        raise ConfigError(f"{key} = {path!r} does not exist; give a text file, a folder of them or a file of tokens")
    if not place.stat().st_size:
        raise ConfigError(f"{key} = {path!r} is an empty file; give one with text")
    return Text((place,), path, False)


def library() -> Text:
    """Sources of the running Python's standard library: about 11 MB of text on every machine."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in _walk(root, NOT_LIBRARY) if f.suffix == ".py")
    if not files:
        raise ConfigError(f"{root} holds no Python sources (a stripped or zipped Python); set data.path to a text file")
    return Text(tuple(files), f"Python standard library ({root})", True)


def content_digest(text: Text, tell: Callable[[int], None]) -> str:
    """Hash of the content, whatever the names; ``tell`` hears of the bytes of each chunk.

    Reads everything (about 1 GB/s): what was tokenised from a text is used again only for the same text.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for file in text.files:
        hasher.update(_size(file).to_bytes(8, "little"))
        with _open(file) as stream:
            while chunk := stream.read(CHUNK):
                hasher.update(chunk)
                tell(len(chunk))
    return hasher.hexdigest()


def _part(file: Path) -> bytes:
    with _open(file) as stream:
        part = stream.read()
    if SEPARATOR in part:
        raise ConfigError(f"{file} contains a zero byte and is not text; point data.path at text files only")
    return part


def _file_pieces(file: Path) -> Iterator[tuple[str, int, bool]]:
    left, at, ended = b"", 0, False
    with _open(file) as stream:
        while not ended:
            chunk = stream.read(CHUNK)
            block, ended = left + chunk, len(chunk) < CHUNK
            cut = len(block) if ended else _boundary(block)
            try:
                text = block[:cut].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{file} is not UTF-8: byte {at + error.start} is 0x{block[error.start]:02x}; convert it, or "
                    "train on bytes (data.tokenizer = byte)"
                ) from None
            yield text, cut, ended
            at, left = at + cut, block[cut:]


def _boundary(block: bytes) -> int:
    """Where to cut text that goes on: after the last line end, else before the last character, which may go on."""
    line = block.rfind(b"\n") + 1
    if line:
        return line
    for cut in range(len(block) - 1, max(-1, len(block) - 5), -1):
        if block[cut] & 0xC0 != 0x80:  # not the continuation of a character
            return cut
    return len(block)  # four continuations: not UTF-8, which decoding will say


def _open(file: Path) -> BinaryIO:
    try:
        return file.open("rb")
    except OSError as error:
        raise ConfigError(f"{file} of the data cannot be read: {error.strerror}") from None


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise ConfigError(f"{file} of the data cannot be read: {error.strerror}") from None


def _walk(root: Path, without: frozenset[str]) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if n not in without and not n.startswith(".")]
        yield from (Path(folder, f) for f in files)
