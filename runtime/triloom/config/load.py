"""From a TOML file and command-line overrides to one typed, frozen Config, or one list of errors.

Order of precedence: defaults, then the file, then the command line. Every key given must exist and be
used; every problem found is reported at once, each with its key, its value and where it was given.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from ..errors import ConfigError
from .rules import Kind, from_text, from_toml, kind_of, suggest
from .schema import SECTIONS, Config


class Setting(NamedTuple):
    """One ``section.key`` as it was given. ``raw``: text of the command line, or a TOML value."""

    key: str
    raw: Any
    source: str
    from_file: bool


@dataclass(frozen=True)
class Loaded:
    """A configuration and where each key that is not a default was given."""

    config: Config
    sources: Mapping[str, str]


def kinds() -> dict[str, Kind]:
    """Type and rules of every key, in the order of the schema."""
    out: dict[str, Kind] = {}
    for section, cls in SECTIONS.items():
        hints = get_type_hints(cls, include_extras=True)
        out.update({f"{section}.{f.name}": kind_of(hints[f.name]) for f in fields(cls)})
    return out


def load(words: Sequence[str] = (), path: str | Path | None = None) -> Loaded:
    """Configuration of a TOML file (optional) and ``--section.key value`` words.

    Raises ConfigError listing every problem.
    """
    known = kinds()
    problems: list[str] = []
    settings = read_words(words, known, problems)
    if path is not None:
        settings = read_file(Path(path), problems) + settings
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in settings:
        if setting.key not in known:
            problems.append(_unknown(setting, known))
            continue
        try:
            read = from_toml if setting.from_file else from_text
            values[setting.key] = read(known[setting.key], setting.raw)
            sources[setting.key] = setting.source
        except ConfigError as error:
            problems.append(f"{setting.key} = {setting.raw!r} ({setting.source}): {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return Loaded(build(values), sources)


def build(values: Mapping[str, Any]) -> Config:
    """Config of typed values by ``section.key``; the rest are defaults."""
    by_section: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in values.items():
        section, name = key.split(".")
        by_section[section][name] = value
    return Config(**{name: cls(**by_section[name]) for name, cls in SECTIONS.items()})


def read_words(words: Sequence[str], known: Mapping[str, Kind], problems: list[str]) -> list[Setting]:
    """Settings of ``--section.key value`` and ``--section.key=value``; a bare bool key means true."""
    out: dict[str, Setting] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) < 3:
            problems.append(f"{word!r} (command line) is not an option; options look like --section.key value")
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            bare_bool = key in known and known[key].scalar is bool and (not rest or rest[0].startswith("--"))
            if bare_bool:
                value = "true"
            elif rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            elif key in known:
                problems.append(f"--{key} (command line) needs a value of type {known[key].name}")
                continue
        if key in out:
            problems.append(f"--{key} is given twice on the command line: {out[key].raw!r} and {value!r}; keep one")
        out[key] = Setting(key, value, "command line", False)
    return list(out.values())


def read_file(path: Path, problems: list[str]) -> list[Setting]:
    """Settings of a TOML file with one table per section."""
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        reason = f"--config {str(path)!r} cannot be read: {error.strerror}; give the path of a TOML file"
        raise ConfigError(reason) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    lines = key_lines(text)
    out: list[Setting] = []
    for section, table in tables.items():
        if not isinstance(table, dict):
            near = suggest(section, SECTIONS) or f"; sections are {', '.join(SECTIONS)}"
            problems.append(f"{section} = {table!r} ({_at(path, lines, section)}): a key needs a section{near}")
            continue
        if section not in SECTIONS and not table:
            problems.append(f"[{section}] ({_at(path, lines, section)}) is not a section{suggest(section, SECTIONS)}")
        for name, value in table.items():
            key = f"{section}.{name}"
            out.append(Setting(key, value, _at(path, lines, key), True))
    return out


_HEADER = re.compile(r"\s*\[\s*([^\[\]]+?)\s*\]")
_ENTRY = re.compile(r"\s*([\w.\"'\- ]+?)\s*=")


def key_lines(text: str) -> dict[str, int]:
    """Line number of every ``section.key`` and ``[section]`` of a TOML text (tomllib does not tell)."""
    out: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            section = header[1].strip("\"'")
            out.setdefault(section, number)
        elif entry := _ENTRY.match(line):
            key = entry[1].replace('"', "").replace("'", "").replace(" ", "")
            out.setdefault(f"{section}.{key}" if section else key, number)
    return out


def _at(path: Path, lines: Mapping[str, int], key: str) -> str:
    return f"{path}:{lines[key]}" if key in lines else str(path)


def _unknown(setting: Setting, known: Mapping[str, Kind]) -> str:
    section, _, name = setting.key.partition(".")
    own = [key for key in known if key.startswith(section + ".")]
    same_name = [key for key in known if key.endswith("." + (name or section))]
    near = suggest(setting.key, known)
    if not near and same_name:
        near = f"; did you mean {same_name[0]!r}?"
    if not near:
        near = f"; keys of [{section}] are {', '.join(own)}" if own else f"; sections are {', '.join(SECTIONS)}"
    return f"{setting.key} = {setting.raw!r} ({setting.source}) is not a key{near}"
