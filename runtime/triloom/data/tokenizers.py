"""Text to token ids: bytes, characters, or byte-pair encoding by the ``tokenizers`` library.

A tokenizer that depends on the text is a file (:data:`CHARACTERS` or :data:`TOKENIZER`), which is kept with
the run and can be given to another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .text import CHUNK, Text
from .tokens import Ids

CHARACTERS, TOKENIZER = "characters.json", "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
"""Token that a trained vocabulary has for the end of a file."""
CODE_POINTS = 0x110000
TRAINED_ON = 256 << 20
"""Most bytes of text that a vocabulary is trained on; of a larger one evenly spread pieces (the library's
memory grows with the number of different words)."""

Tell = Callable[[int], None]
"""Hears of the bytes of text that are done."""


class Tokenizer(Protocol):
    """Token ids of text, and the text of token ids as far as its length goes."""

    @property
    def name(self) -> str:
        """For people."""
        ...

    @property
    def vocab(self) -> int: ...

    @property
    def file(self) -> tuple[str, str] | None:
        """Name and content of the file that it can be made from again; None if nothing is needed."""
        ...

    def encode(self, text: Text, tell: Tell) -> Iterator[Ids]:
        """Its tokens in pieces, a separator between the files of a folder where there is one."""
        ...

    def byte_count(self, ids: Ids) -> int:
        """Bytes of UTF-8 text that the ids stand for, separators not counted as text where they are none."""
        ...


@dataclass(frozen=True)
class Bytes:
    """Every byte is a token."""

    name: str = "bytes"
    vocab: int = 256
    file: None = None

    def encode(self, text: Text, tell: Tell) -> Iterator[Ids]:
        yield text.as_bytes().array
        tell(text.size())

    def byte_count(self, ids: Ids) -> int:
        return int(ids.size)


@dataclass(frozen=True)
class Characters:
    """Every code point of the corpus is a token, in ascending order."""

    points: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.vocab} characters"

    @property
    def vocab(self) -> int:
        return len(self.points)

    @property
    def file(self) -> tuple[str, str]:
        return CHARACTERS, json.dumps({"characters": "".join(map(chr, self.points))}, indent=1) + "\n"

    def encode(self, text: Text, tell: Tell) -> Iterator[Ids]:
        """Raises ConfigError for a character that is not in the vocabulary."""
        table = np.full(CODE_POINTS, self.vocab, dtype=np.uint32)
        table[list(self.points)] = np.arange(self.vocab, dtype=np.uint32)
        dtype = smallest_dtype(self.vocab)
        for piece, size in _with_separators(text):
            ids = table[_code_points(piece)]
            if len(ids) and ids.max() == self.vocab:
                stranger = piece[int(np.argmax(ids == self.vocab))]
                raise ConfigError(
                    f"{text.name} has the character {stranger!r}, which is not among the {self.name} of "
                    "data.tokenizer; take a vocabulary made of this text"
                )
            tell(size)
            yield ids.astype(dtype)

    def byte_count(self, ids: Ids) -> int:
        return int(self._widths[ids].sum())

    @cached_property
    def _widths(self) -> NDArray[np.int64]:
        return np.array([len(chr(p).encode()) for p in self.points], dtype=np.int64)


@dataclass(frozen=True)
class Subwords:
    """A tokenizer of the ``tokenizers`` library.

    content: its tokenizer.json. end: id put after every file of text, None for none.
    """

    content: str = field(repr=False)
    end: int | None

    @property
    def name(self) -> str:
        return f"{TOKENIZER} with {self.vocab:,} tokens"

    @cached_property
    def _made(self) -> Any:
        try:
            return _library().Tokenizer.from_str(self.content)
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"data.tokenizer: not a tokenizer.json of the tokenizers library: {error}") from None

    @cached_property
    def vocab(self) -> int:
        """One more than the largest id: ids may have gaps."""
        ids: dict[str, int] = self._made.get_vocab(with_added_tokens=True)
        return 1 + max(ids.values())

    def id_of(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        found: int | None = self._made.token_to_id(token)
        return found

    @property
    def file(self) -> tuple[str, str]:
        return TOKENIZER, self.content

    def encode(self, text: Text, tell: Tell) -> Iterator[Ids]:
        dtype = smallest_dtype(self.vocab)
        encode = getattr(self._made, "encode_batch_fast", self._made.encode_batch)  # fast: without offsets, from 0.20
        for group in _grouped(text.pieces(), 16):
            found = encode([piece for piece, _, _ in group], add_special_tokens=False)
            for encoding, (_, size, ended) in zip(found, group, strict=True):
                tell(size)
                ids = encoding.ids
                yield np.array([*ids, self.end] if ended and self.end is not None else ids, dtype=dtype)

    def byte_count(self, ids: Ids) -> int:
        if self._widths is not None:
            return int(self._widths[ids].sum())
        return len(self._made.decode(ids.ravel().tolist(), skip_special_tokens=True).encode())

    @cached_property
    def _widths(self) -> NDArray[np.int64] | None:
        """Bytes of every token where tokens are strings of bytes (byte-level BPE: a character each), else None."""
        parts = json.loads(self.content)
        if (parts.get("decoder") or {}).get("type") != "ByteLevel":
            return None
        widths = np.zeros(self.vocab, dtype=np.int64)
        special = {token["id"] for token in parts.get("added_tokens", ()) if token.get("special")}
        for token, index in self._made.get_vocab(with_added_tokens=True).items():
            widths[index] = 0 if index in special else len(token)
        return widths


def characters_of(texts: Sequence[Text], tell: Tell) -> Characters:
    """The code points of all texts, the separator of a folder's files among them."""
    seen = np.zeros(CODE_POINTS, dtype=bool)
    for text in texts:
        for piece, size in _with_separators(text):
            seen[_code_points(piece)] = True
            tell(size)
    return Characters(tuple(np.flatnonzero(seen).tolist()))


def trained_bpe(texts: Sequence[Text], vocab: int, tell: Tell) -> Subwords:
    """Byte-level BPE of ``vocab`` tokens (all bytes and :data:`END_OF_TEXT` among them) learned from the texts."""
    tokenizers = _library()
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stride = -(-sum(text.size() for text in texts) // TRAINED_ON)

    def some() -> Iterator[str]:
        pieces = (piece for text in texts for piece in text.pieces())
        for number, (piece, size, _) in enumerate(pieces):
            tell(size)
            if number % max(stride, 1) == 0:
                yield piece

    failed: list[ConfigError] = []
    made.train_from_iterator(_keeping(some(), failed), trainer)
    if failed:
        raise failed[0]
    return Subwords(made.to_str(pretty=False), made.token_to_id(END_OF_TEXT))


def given_tokenizer(path: str, eos: int | None) -> Tokenizer:
    """The tokenizer of a file. eos: the id put after a file of text; none: that of END_OF_TEXT, if it has one."""
    file = Path(path).expanduser()
    try:
        content = file.read_text(encoding="utf-8")
        parts = json.loads(content)
    except OSError as error:
        reason = f"{path!r} cannot be read: {error.strerror}; give byte, char, bpe or the path of a {TOKENIZER}"
        raise ConfigError(f"data.tokenizer = {reason}") from None
    except ValueError as error:
        raise ConfigError(f"data.tokenizer = {path!r} is not JSON: {error}") from None
    if isinstance(parts, dict) and isinstance(parts.get("characters"), str):
        points = tuple(map(ord, parts["characters"]))
        if not points or sorted(set(points)) != list(points):
            raise ConfigError(f"data.tokenizer = {path!r}: its characters must be different, and in ascending order")
        if eos is not None:
            raise ConfigError(f"data.eos = {eos} is not used with {path!r}, which has characters only; leave it out")
        return Characters(points)
    if not isinstance(parts, dict) or "model" not in parts:
        raise ConfigError(
            f"data.tokenizer = {path!r} is neither a {TOKENIZER} of the tokenizers library nor {CHARACTERS}"
        )
    made = Subwords(content, eos)
    if eos is None:
        made = Subwords(content, made.id_of(END_OF_TEXT))
    elif not 0 <= eos < made.vocab:
        raise ConfigError(f"data.eos = {eos} is not a token of {path!r}, which has {made.vocab}")
    return made


def digest_of(tokenizer: Tokenizer) -> str:
    """Hash of everything that its ids depend on."""
    parts = (tokenizer.file, tokenizer.vocab, getattr(tokenizer, "end", None))
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def smallest_dtype(vocab: int) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 or uint32, whichever holds ids below ``vocab``: the two dtypes of a token file."""
    return np.dtype("<u2") if vocab <= 1 << 16 else np.dtype("<u4")


def _code_points(piece: str) -> NDArray[np.uint32]:
    return np.frombuffer(piece.encode("utf-32-le"), dtype="<u4")


def _with_separators(text: Text) -> Iterator[tuple[str, int]]:
    """Pieces of text and their bytes; a zero character between the files of a folder."""
    last = len(text.files) - 1
    done = 0
    for piece, size, ended in text.pieces():
        yield piece, size
        if ended and done < last:
            yield "\0", 0
        done += ended


def _grouped(pieces: Iterable[tuple[str, int, bool]], most: int) -> Iterator[list[tuple[str, int, bool]]]:
    """Several pieces at a time, of at most ``most`` chunks: the library encodes them in parallel."""
    group: list[tuple[str, int, bool]] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece[1]
        if size >= most * CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _keeping(pieces: Iterator[str], failed: list[ConfigError]) -> Iterator[str]:
    """The pieces up to an error, which is kept: the library would wrap it in one of its own."""
    try:
        yield from pieces
    except ConfigError as error:
        failed.append(error)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise ConfigError("this tokenizer needs the tokenizers library: pip install 'triloom[data]'") from None
    return tokenizers
