"""The doctor's findings as text for a terminal of 80 columns, and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from .base import Line, Verdict

WIDTH = 80
MARKS: dict[Verdict, str] = {"ok": "ok", "limited": "LIMITED", "missing": "MISSING"}


def as_text(lines: Sequence[Line]) -> str:
    """A paragraph a line: mark, name, what was seen; below it what to do."""
    name_width = max(len(line.name) for line in lines)
    mark_width = max(map(len, MARKS.values()))
    indent = " " * (mark_width + name_width + 4)
    several = len({line.host for line in lines if line.host}) > 1
    out = []
    for line in lines:
        head = f"{MARKS[line.verdict]:<{mark_width}}  {line.name:<{name_width}}  "
        host = f"on {line.host}: " if several and line.host else ""
        out.append(_fill(host + line.says, head, indent))
        if line.fix:
            out.append(_fill(line.fix, f"{indent}-> ", f"{indent}   "))
    bad = [line.name for line in lines if line.verdict == "missing"]
    limited = [line.name for line in lines if line.verdict == "limited"]
    parts = [f"missing: {', '.join(bad)}"] * bool(bad) + [f"limited: {', '.join(limited)}"] * bool(limited)
    out.append(_fill("; ".join(parts) or "nothing is missing", "", ""))
    return "\n".join(out)


def _fill(text: str, first: str, rest: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def as_json(lines: Sequence[Line]) -> str:
    """One object: ``{"lines": [{"name", "verdict", "says", "fix", "host", "data"}, ...]}``."""
    return json.dumps({"lines": [asdict(line) for line in lines]})
