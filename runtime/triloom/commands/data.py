"""``triloom data``: what a source holds, and text tokenised into files."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST
from os import strerror
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from ..config.rules import at_least, one_of
from ..config.schema import TOKEN_DTYPES, Config, DataConfig, Section
from ..data import Sources, Windows, find, open_found
from ..data.batches import Stretch
from ..data.sources import TokenFile
from ..data.text import Text
from ..data.tokenizers import smallest_dtype
from ..data.tokens import Tokens
from ..errors import ConfigError
from ..tokenising import cache_folder, tokenise_here
from .options import describe, read

USAGE = """\
triloom data: look at text and tokens, or tokenise text into files.

  triloom data inspect PATH ...                   kind, tokens, vocabulary, epochs; PATH is what data.path takes
  triloom data tokenize PATH --out FOLDER ...     PATH's text as FOLDER/tokens.bin, with the tokenizer beside it

"""
WRITTEN = 1 << 22
"""Tokens written at a time."""


@dataclass(frozen=True, kw_only=True)
class DataOptions(Section):
    """Options of ``triloom data``."""

    tokenizer: str = "byte"
    """byte, char, bpe, or the path of a tokenizer.json or characters.json."""
    vocab: Annotated[int | None, at_least(257)] = None
    """Tokens of the vocabulary that bpe trains; none: 4096."""
    token_dtype: Annotated[str | None, one_of(TOKEN_DTYPES)] = None
    """Type of the ids in flat token files; none: uint16."""
    eos: Annotated[int | None, at_least(0)] = None
    """As data.eos."""
    seq: Annotated[int, at_least(1)] = 128
    """Tokens of a sample (inspect)."""
    batch: Annotated[int, at_least(1)] = 32
    """Samples of a step (inspect)."""
    out: str | None = None
    """Folder to write to (tokenize); it is made, and nothing in it is replaced."""


def run_data(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if not words or "--help" in words or "-h" in words:
        print(USAGE + describe(DataOptions), end="")
        return 0 if words else 2
    options, names = read(DataOptions, words)
    if len(names) != 2 or names[0] not in VERBS:
        raise ConfigError(f"triloom data takes {' or '.join(VERBS)} and one path, got {' '.join(names) or 'nothing'}")
    VERBS[names[0]](names[1], options)
    return 0


def inspect(path: str, options: DataOptions) -> None:
    """Print what ``path`` holds."""
    with opened(path, options) as (source, sources):
        tokens = sources.train[0].tokens
        low, high = tokens.bounds()
        print(f"{path}: {kind_of(source, options)}")
        made = sources.tokenizer
        print(f"  {len(tokens):,} tokens, ids {low} to {high}{'' if made is None else f'; {made.name}'}")
        windows = Windows((Stretch(tokens),), options.seq, 0)
        steps = windows.count / options.batch
        print(f"  {windows.count:,} windows of {options.seq} tokens: {steps:,.1f} steps of {options.batch} an epoch")


def kind_of(source: Text | TokenFile, options: DataOptions) -> str:
    """A source in a few words."""
    if isinstance(source, Text):
        return f"text, {len(source.files):,} file{'s' * (len(source.files) > 1)}, {source.size():,} bytes"
    return "Megatron pair" if source.megatron else f"flat file of {options.token_dtype or 'uint16'} tokens"


def tokenize(path: str, options: DataOptions) -> None:
    """Write the tokens of the text at ``path``, and its tokenizer, to ``--out``."""
    if options.out is None:
        raise ConfigError("triloom data tokenize needs --out FOLDER")
    out = Path(options.out).expanduser()
    with opened(path, options) as (source, sources):
        if isinstance(source, TokenFile) or sources.tokenizer is None:
            raise ConfigError(f"{path} is tokens already; give text")
        dtype, tokens = smallest_dtype(sources.tokenizer.vocab), sources.train[0].tokens
        file = sources.tokenizer.file
        try:
            out.mkdir(parents=True, exist_ok=True)
            if file is not None:
                with (out / file[0]).open("x", encoding="utf-8") as made:
                    made.write(file[1])
            write_flat(out / "tokens.bin", tokens, dtype)
        except OSError as error:
            where = error.filename or out
            raise ConfigError(f"{where} cannot be written: {error.strerror}; give another --out") from None
        print(f"{out / 'tokens.bin'}: {len(tokens):,} tokens of {sources.tokenizer.name}")
        words = [f"--data.path {out / 'tokens.bin'}"]
        words += [f"--data.tokenizer {out / file[0]}"] if file is not None else [f"--model.vocab {sources.vocab}"]
        words += ["--data.token_dtype uint32"] if dtype.itemsize == 4 else []
        print(f"train on it with {' '.join(words)}")


def write_flat(path: Path, tokens: Tokens, dtype: np.dtype[Any]) -> None:
    """A flat file of token ids, there when it is whole. Raises OSError, also if ``path`` exists."""
    if path.exists():
        raise FileExistsError(EEXIST, strerror(EEXIST), str(path))
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as stream:
            for start in range(0, len(tokens), WRITTEN):
                piece = tokens.part(start, min(len(tokens), start + WRITTEN))
                stream.write(piece.windows(np.zeros(1, dtype=np.int64), len(piece))[0].astype(dtype).data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


VERBS: dict[str, Callable[[str, DataOptions], None]] = {"inspect": inspect, "tokenize": tokenize}


@contextmanager
def opened(path: str, options: DataOptions) -> Iterator[tuple[Text | TokenFile, Sources]]:
    """The source at ``path``, tokenised in a folder that is gone afterwards."""
    keys = {name: getattr(options, name) for name in ("tokenizer", "vocab", "token_dtype", "eos")}
    with tempfile.TemporaryDirectory(prefix="triloom-data-") as temp:
        data = DataConfig(path=path, cache=temp, **keys)
        found = find(data)
        config = Config(data=data)
        ready = tokenise_here(config, sys.stderr)
        yield found.train[0], open_found(data, found, cache_folder(config), ready)
