"""The configuration as text: ``--help`` from the schema's own docstrings, and TOML that loads again."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from .load import kinds
from .schema import SECTIONS, Config


def field_docs(cls: type) -> dict[str, str]:
    """Docstring under each field of a dataclass, read from its source once per call."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    body = getattr(tree, "body", [])
    out: dict[str, str] = {}
    for entry, after in itertools.pairwise(body):
        match entry, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                out[name] = " ".join(text.split())
    return out


def help_fields(width: int = 100) -> str:
    """Every section and key: type, text, rule and default."""
    return "\n".join(_help_lines(Config(), width))


def _help_lines(defaults: Config, width: int) -> Iterator[str]:
    known = kinds()
    for section, cls in SECTIONS.items():
        yield f"\n[{section}] {inspect.getdoc(cls)}"
        docs = field_docs(cls)
        for field in fields(cls):
            kind = known[f"{section}.{field.name}"]
            default = plain(getattr(getattr(defaults, section), field.name))
            rules = "".join(f" Must be {rule.says}." for rule in kind.rules)
            yield f"  --{section}.{field.name} {kind.name.upper()}"
            text = f"{docs[field.name]}{rules} Default: {default}."
            yield textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def plain(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(plain(v) for v in value)
    return str(value)


def to_toml(config: Config, head: str = "") -> str:
    """TOML text that :func:`triloom.config.load` turns into an equal Config."""
    lines = [f"# {line}" for line in head.splitlines()]
    for section, cls in SECTIONS.items():
        lines += ["", f"[{section}]"]
        part = getattr(config, section)
        lines += [f"{f.name} = {_toml(getattr(part, f.name))}" for f in fields(cls)]
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(v) for v in value)}]"
    # A JSON string is a TOML basic string once non-ASCII is left as it is; DEL must be escaped too.
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) else json.dumps(value)
