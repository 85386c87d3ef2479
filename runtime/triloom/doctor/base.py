"""What every probe gets and gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..boot import World

Verdict = Literal["ok", "limited", "missing"]
"""limited: works, not as well as it could. missing: something that needs it does not work."""


@dataclass(frozen=True)
class Seen:
    """What a look found: a sentence, and the plain values behind it (for ``--json``)."""

    says: str
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where to look: the folder that state would be offloaded to, and the ranks."""

    folder: Path
    world: World


class Probe(NamedTuple):
    """A row of the table. fix: what to do unless the verdict is ok; it may name the values of ``Seen.data``."""

    name: str
    look: Callable[[Place], Seen]
    verdict: Callable[[dict[str, Any]], Verdict]
    fix: str = ""


@dataclass(frozen=True)
class Line:
    """A probe's outcome on one host."""

    name: str
    verdict: Verdict
    says: str
    fix: str
    host: str
    data: dict[str, Any]


def run(probe: Probe, place: Place, host: str) -> Line:
    """Look once. What goes wrong in looking is the finding: a doctor never dies of the illness."""
    try:
        seen = probe.look(place)
        verdict = probe.verdict(seen.data)
    except Exception as error:
        seen, verdict = Seen(f"{type(error).__name__}: {error}"), "missing"
    fix = "" if verdict == "ok" else probe.fix.format_map(_Shown(seen.data))
    return Line(probe.name, verdict, seen.says, fix, host, seen.data)


class _Shown(dict[str, Any]):
    """Values for a fix; one that the look did not get to is shown by its name."""

    def __missing__(self, key: str) -> str:
        return key.upper()


def mib(nbytes: float) -> str:
    """``512 MiB``, ``1.5 GiB``"""
    return f"{nbytes / 2**20:.0f} MiB" if nbytes < 2**30 else f"{nbytes / 2**30:.1f} GiB"
