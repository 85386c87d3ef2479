"""Tuned configurations as data: a table per architecture, chosen offline and committed, never searched in a step.

``tuning/sm_90.json`` holds for each operation a list of entries, narrowest first. The first entry whose bounds
(``max``) hold the shape is used; the last one usually has none. ``options`` goes to the launch as it is: constexprs of
the kernel, num_warps, num_stages, and what the operation itself reads. ``measured`` says whether a GPU chose it
(``python -m triloom_kernels.tune``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

FOLDER = Path(__file__).with_name("tuning")
ARCHITECTURES = (80, 90, 100)
INTERPRETED_AS = 90
"""The table of architecture 0: what the interpreter runs is what a Hopper GPU would."""


@dataclass(frozen=True)
class Entry:
    """One configuration and the shapes it is for."""

    bounds: Mapping[str, int]
    """Largest value of each named size; a size that is not named may have any."""
    options: Mapping[str, Any]
    measured: bool

    def holds(self, shape: Mapping[str, int]) -> bool:
        return all(shape[name] <= bound for name, bound in self.bounds.items())


def nearest(arch: int) -> int:
    """The architecture whose table serves ``arch``: the newest that is not newer, the oldest for older ones."""
    if arch == 0:
        return INTERPRETED_AS
    return max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])


@cache
def table(arch: int) -> Mapping[str, tuple[Entry, ...]]:
    """All entries of one of ARCHITECTURES by operation."""
    read = json.loads((FOLDER / f"sm_{arch}.json").read_text())
    return MappingProxyType(
        {
            op: tuple(
                Entry(MappingProxyType(e.get("max", {})), MappingProxyType(e["options"]), e["measured"]) for e in rows
            )
            for op, rows in read.items()
        }
    )


def entries(op: str, arch: int) -> tuple[Entry, ...]:
    """Every configuration of an operation; KeyError naming the operations there are."""
    known = table(nearest(arch))
    if op not in known:
        raise KeyError(f"no tuned configuration for operation {op!r}; there are {', '.join(sorted(known))}")
    return known[op]


@cache
def _lookup(op: str, arch: int, shape: tuple[tuple[str, int], ...]) -> Mapping[str, Any]:
    sizes = dict(shape)
    for entry in entries(op, arch):
        if entry.holds(sizes):
            return entry.options
    told = ", ".join(f"{name}={size}" for name, size in shape)
    largest = dict(entries(op, arch)[-1].bounds)
    raise ValueError(f"{op} has no configuration for {told}: the largest is {largest}; use the eager operation there")


@dataclass
class Trial:
    """Options that one operation's launches take instead of the table's."""

    op: str
    options: Mapping[str, Any]
    asked: int = 0
    """How often they were asked for: 0 says that what ran does not read this table."""


_trial: ContextVar[Trial | None] = ContextVar("triloom_kernels_trial", default=None)


@contextmanager
def trying(op: str, options: Mapping[str, Any]) -> Iterator[Trial]:
    """Inside, and in this context (thread, task) only, ``options`` are those of ``op`` for any shape; for the tuner.

    A backward on a GPU runs in a thread of autograd's own, unless ``torch.autograd.set_multithreading_enabled(False)``.
    Outside it costs each launch one look at a context variable: tens of nanoseconds.
    """
    trial = Trial(op, options)
    token = _trial.set(trial)
    try:
        yield trial
    finally:
        _trial.reset(token)


def options(op: str, arch: int, **shape: int) -> dict[str, Any]:
    """Configuration of ``op`` on compute capability ``arch`` (ten times the number, 0 in the interpreter) for a shape.

    A fresh dict. Raises KeyError for an operation without entries, ValueError for a shape beyond the last one.
    """
    trial = _trial.get()
    if trial is not None and trial.op == op:
        trial.asked += 1
        return dict(trial.options)
    return dict(_lookup(op, arch, tuple(shape.items())))
