"""What ``[data]`` names: text, flat token files, Megatron files; found first, tokenised where that is needed, opened.

:func:`find` looks at names only. :func:`tokenise` does the long part, which one process of a host does for all of
them; its result is a few names in the cache. :func:`open_found` maps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..config.schema import DataConfig
from ..errors import ConfigError
from . import cache
from .files import open_flat, open_megatron, with_suffix
from .text import Text, content_digest, find_text
from .tokenizers import (
    CHARACTERS,
    TOKENIZER,
    Bytes,
    Tokenizer,
    characters_of,
    digest_of,
    given_tokenizer,
    trained_bpe,
)
from .tokens import Tokens

IN_MEMORY = 256 << 20
"""Largest folder of text that every rank joins in its own memory instead of in the cache, in bytes."""
BPE_VOCAB = 4096


@dataclass(frozen=True)
class TokenFile:
    """A source that is tokens already. megatron: ``path`` is the prefix of a .bin and an .idx."""

    path: Path
    name: str
    megatron: bool


@dataclass(frozen=True)
class Found:
    """The sources of a configuration, by their names alone."""

    train: tuple[Text | TokenFile, ...]
    validation: Text | TokenFile | None

    @property
    def _every(self) -> tuple[Text | TokenFile, ...]:
        return (*self.train, *((self.validation,) if self.validation else ()))

    @property
    def texts(self) -> tuple[Text, ...]:
        return tuple(source for source in self._every if isinstance(source, Text))

    @property
    def token_files(self) -> tuple[TokenFile, ...]:
        return tuple(source for source in self._every if isinstance(source, TokenFile))


@dataclass(frozen=True)
class Tokenised:
    """Where the cache has what was tokenised: names of folders in it, the same on every host.

    tokenizer: name and folder of a tokenizer made here, None for one that needs none or was given.
    texts: folder of each text, in order.
    """

    tokenizer: tuple[str, str] | None
    texts: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Tokenised:
        made = value["tokenizer"]
        return cls(None if made is None else (made[0], made[1]), tuple(value["texts"]))


@dataclass(frozen=True)
class Source:
    """Tokens to train on or to evaluate. checked: ids are known to be below the vocabulary."""

    tokens: Tokens
    name: str
    checked: bool


@dataclass(frozen=True)
class Sources:
    """Everything that is open. vocab: None if nothing but token files says it."""

    train: tuple[Source, ...]
    validation: Source | None
    tokenizer: Tokenizer | None
    vocab: int | None

    @property
    def every(self) -> tuple[Source, ...]:
        return (*self.train, *((self.validation,) if self.validation else ()))


def find(config: DataConfig) -> Found:
    """Which files the configuration means. Raises ConfigError for one that is not there."""
    train: tuple[Text | TokenFile, ...] = (_find(config.path, "data.path"),) if config.paths is None else ()
    train += tuple(_find(path, "data.paths") for path in config.paths or ())
    found = Found(train, None if config.validation is None else _find(config.validation, "data.validation"))
    _check_keys(config, found)
    return found


def _check_keys(config: DataConfig, found: Found) -> None:
    """Raise ConfigError for keys that these sources do not use, or cannot."""
    files = found.token_files
    if config.tokenizer in MADE and files:
        raise ConfigError(
            f"data.tokenizer = {config.tokenizer} makes a vocabulary from text, but {files[0].name} is tokens of "
            f"another one; leave it out, or give the {TOKENIZER} that made them"
        )
    if config.token_dtype is not None and all(file.megatron for file in files):
        raise ConfigError(f"data.token_dtype = {config.token_dtype}: no source is a flat token file; leave it out")
    ends = any(file.megatron for file in files) or (found.texts and config.tokenizer not in ("byte", "char"))
    if config.eos is not None and not ends:
        raise ConfigError(
            f"data.eos = {config.eos} stands after the documents of Megatron's files and of text in a {TOKENIZER}; "
            "leave it out"
        )


def _find(path: str | None, key: str) -> Text | TokenFile:
    """A token file by its name: .bin, .idx, or the prefix of such a pair. Everything else is text."""
    if path is None:
        return find_text(None, key)
    place = Path(path).expanduser()
    try:
        return _classify(path, place, key)
    except OSError as error:
        raise ConfigError(f"{key} = {path!r} cannot be read: {error.strerror}") from None


def _classify(path: str, place: Path, key: str) -> Text | TokenFile:
    if place.is_dir():
        return find_text(path, key)
    prefix = place.with_suffix("") if place.suffix in (".bin", ".idx") else place
    if place.suffix == ".idx" or (not place.exists() and with_suffix(place, ".bin").exists()):
        return TokenFile(prefix, path, True)
    if place.suffix == ".bin" and place.is_file():
        pair = with_suffix(prefix, ".idx").exists()
        return TokenFile(prefix if pair else place, path, pair)
    return find_text(path, key)


def is_long(config: DataConfig, found: Found) -> bool:
    """Whether there is something to tokenise before the sources can be opened."""
    if config.tokenizer == "byte":
        return any(text.folder and text.size() > IN_MEMORY for text in found.texts)
    return bool(found.texts)


def tokenise(
    config: DataConfig, found: Found, folder: Path, show: Callable[[str, int, int], None], say: Callable[[str], None]
) -> Tokenised:
    """Tokenise every text into ``folder``, or find it there; a damaged one is made anew.

    show: hears what is being done, and how many bytes of how many. say: hears what a person should know. Raises
    ConfigError.
    """
    texts = found.texts

    def stage(what: str, count: int) -> Callable[[int], None]:
        done = 0

        def tell(size: int) -> None:
            nonlocal done
            done += size
            show(what, done, count)

        return tell

    total = sum(text.size() for text in texts)
    reading = stage("reading text", total)
    contents = [content_digest(text, reading) for text in texts]
    made: tuple[str, str] | None = None
    if config.tokenizer in MADE:
        # Validation text says which characters there are, but no vocabulary is trained on it.
        seen = len(texts) if config.tokenizer == "char" else sum(isinstance(source, Text) for source in found.train)
        made = _make_tokenizer(config, texts[:seen], contents[:seen], folder, stage, say)
    tokenizer = _tokenizer(config, folder, made)
    tokenising = stage("tokenising", total)
    keys = []
    for text, content in zip(texts, contents, strict=True):
        key = cache.key_of("tokens", content, digest_of(tokenizer), text.folder)
        if not _is_whole(folder, key, partial(cache.is_intact, folder, key), say):
            cache.write_tokens(folder, key, text, tokenizer, tokenising)
        keys.append(key)
    return Tokenised(made, tuple(keys))


MADE: Mapping[str, str] = {"char": CHARACTERS, "bpe": TOKENIZER}
"""Tokenizers made from the text, and the files they are."""


def _make_tokenizer(
    config: DataConfig,
    texts: Sequence[Text],
    contents: Sequence[str],
    folder: Path,
    stage: Callable[[str, int], Callable[[int], None]],
    say: Callable[[str], None],
) -> tuple[str, str]:
    """Name and folder of the tokenizer made from the texts, there afterwards."""
    name, vocab = MADE[config.tokenizer], config.vocab or BPE_VOCAB
    key = cache.key_of(config.tokenizer, contents, [text.folder for text in texts], vocab)
    if not _is_whole(folder, key, lambda: cache.read_file(folder, key, name) is not None, say):
        tell = stage("making the vocabulary", sum(text.size() for text in texts))
        made = characters_of(texts, tell) if config.tokenizer == "char" else trained_bpe(texts, vocab, tell)
        if made.file is not None:
            cache.write_file(folder, key, *made.file)
    return name, key


def _is_whole(folder: Path, key: str, whole: Callable[[], bool], say: Callable[[str], None]) -> bool:
    """Whether ``folder/key`` is there and ``whole``; what is damaged is removed, and told."""
    there = (folder / key).is_dir()  # before the look inside: another process may put a good one there meanwhile
    if there and whole():
        return True
    if there:
        say(f"{folder / key} is damaged and is made anew")
        cache.clear(folder, key)
    return False


def _tokenizer(config: DataConfig, folder: Path, made: tuple[str, str] | None) -> Tokenizer:
    if config.tokenizer == "byte":
        return Bytes()
    if made is None:
        return given_tokenizer(config.tokenizer, config.eos)
    return given_tokenizer(str(folder / made[1] / made[0]), config.eos)


def open_found(config: DataConfig, found: Found, folder: Path, tokenised: Tokenised | None) -> Sources:
    """Map every source. tokenised: what :func:`tokenise` gave, None if nothing was long. Raises ConfigError."""
    tokenizer: Tokenizer | None = None
    if found.texts or config.tokenizer != "byte":
        tokenizer = _tokenizer(config, folder, None if tokenised is None else tokenised.tokenizer)
    ready = iter(() if tokenised is None else tokenised.texts)

    def opened(source: Text | TokenFile) -> Source:
        try:
            if isinstance(source, TokenFile):
                return _open_tokens(config, source)
            tokens = source.as_bytes() if tokenised is None else cache.read_tokens(folder, next(ready))
        except OSError as error:
            raise ConfigError(f"{source.name} cannot be read: {error.strerror}") from None
        return Source(tokens, source.name, True)

    train = tuple(opened(source) for source in found.train)
    validation = None if found.validation is None else opened(found.validation)
    return Sources(train, validation, tokenizer, None if tokenizer is None else tokenizer.vocab)


def _open_tokens(config: DataConfig, source: TokenFile) -> Source:
    if source.megatron:
        return Source(open_megatron(source.path, config.eos), source.name, False)
    return Source(open_flat(source.path, config.token_dtype or "uint16"), source.name, False)
