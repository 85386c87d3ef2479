"""Options of a command as a dataclass: its fields, annotations and docstrings are the options, rules and help."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import TypeVar, get_type_hints

from ..config.load import read_words
from ..config.rules import Kind, from_text, kind_of, suggest
from ..config.schema import Section
from ..config.show import field_docs, plain
from ..errors import ConfigError

Options = TypeVar("Options", bound=Section)


def kinds_of(cls: type[Section]) -> dict[str, Kind]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: kind_of(hints[f.name]) for f in fields(cls)}  # type: ignore[arg-type]


def read(cls: type[Options], words: Sequence[str]) -> tuple[Options, list[str]]:
    """Options from ``--name value`` and ``--name=value``, and the words before the first of them.

    Raises ConfigError with every problem found.
    """
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    known = kinds_of(cls)
    problems: list[str] = []
    values = {}
    for setting in read_words(words[first:], known, problems):
        if setting.key not in known:
            near = suggest(setting.key, known) or f"; options are {', '.join(f'--{name}' for name in known)}"
            problems.append(f"--{setting.key} is not an option{near}")
            continue
        try:
            values[setting.key] = from_text(known[setting.key], setting.raw)
        except ConfigError as error:
            problems.append(f"--{setting.key} {setting.raw!r}: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return cls(**values), list(words[:first])


def describe(cls: type[Section], width: int = 100) -> str:
    """The options with type, text, rule and default."""
    return "\n".join(_lines(cls, width)) + "\n"


def _lines(cls: type[Section], width: int) -> Iterator[str]:
    docs, defaults = field_docs(cls), cls()
    for name, kind in kinds_of(cls).items():
        default = getattr(defaults, name)
        rules = "".join(f" Must be {rule.says}." for rule in kind.rules)
        shown = "" if default is None or default is False else f" Default: {plain(default)}."
        yield f"  --{name}" + ("" if kind.scalar is bool else f" {kind.name.removesuffix('|none').upper()}")
        text = f"{docs[name]}{rules}{shown}"
        yield textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
