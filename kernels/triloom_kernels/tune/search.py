"""The search: candidates that give right results are timed in turn, and the fastest becomes the entry."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tuning import Entry, trying
from .candidates import CANDIDATES, Options, Range, candidates
from .work import WORK, Extent, Problem, Results, Run, sizes_of

Timer = Callable[[Mapping[str, Callable[[], object]], torch.device, int], Mapping[str, Sequence[float]]]
"""Seconds of each call by name, calls in turn: ``bench.timing.interleaved``."""
Tables = dict[str, list[Entry]]
GAIN = 0.01
"""What is in the table stays unless another is faster by more than this part: less is noise."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of an element plus the largest of its tensor, against eager torch of the same type; 16 bits: 4e-2."""


@dataclass(frozen=True)
class Tuner:
    """How to search. say: is told what is found and what is skipped."""

    extent: Extent
    timer: Timer
    rounds: int
    say: Callable[[str], None]
    ranges: Mapping[str, Sequence[Range]]


def tune(op: str, entries: Sequence[Entry], tuner: Tuner) -> list[Entry]:
    """The entries of one table with the fastest options found for each."""
    return [_entry(op, entry, tuner) for entry in entries]


def _entry(op: str, entry: Entry, tuner: Tuner) -> Entry:
    sizes = sizes_of(op, entry.bounds)
    told = f"{op} {' '.join(f'{k}={v}' for k, v in sizes.items())}".strip()
    current = dict(entry.options)
    tried = [current, *(c for c in candidates(op, sizes, tuner.ranges) if c != current)]
    for options in tried:
        if set(options) != set(current):
            raise ValueError(f"{told}: candidate {options} must name {', '.join(current)}, as the entry it replaces")
    problem = WORK[op].make(tuner.extent, **sizes)
    wanted = problem.prepare(problem.eager)()
    runs: dict[str, Run] = {}
    for options in tried:
        try:
            runs[json.dumps(options)] = _checked(op, options, problem, wanted)
        except Exception as error:  # does not compile or fit, or is wrong: said, and not taken
            tuner.say(f"{told}: skipped {options}: {type(error).__name__}: {error}"[:300])
            if tuner.extent.device.type == "cuda":
                torch.cuda.synchronize()  # a device that is broken by it ends the tuning here
    if not runs:
        raise RuntimeError(f"{told}: no candidate works; the table is left as it is")
    seconds = {name: statistics.median(t) for name, t in tuner.timer(runs, tuner.extent.device, tuner.rounds).items()}
    best, now = min(seconds, key=seconds.__getitem__), json.dumps(current)
    if now in seconds and seconds[now] <= seconds[best] * (1 + GAIN):
        best = now
    before = f", {seconds[now] * 1e6:.1f} before" if now in seconds else ", what was there failed"
    tuner.say(f"{told}: {seconds[best] * 1e6:.1f} us{before}; {best}; {len(runs)} of {len(tried)} timed")
    return Entry(entry.bounds, json.loads(best), measured=True)


def _checked(op: str, options: Options, problem: Problem, wanted: Results) -> Run:
    """What is timed, its results compared once. Forward and backward run in this thread, where the options are seen."""

    def under(run: Callable[[], Any]) -> Any:
        with trying(op, options) as trial, torch.autograd.set_multithreading_enabled(False):
            made = run()
        asked.append(trial.asked)
        return made

    asked: list[int] = []
    prepared: Run = under(lambda: problem.prepare(problem.kernel))
    compare(under(prepared), wanted)
    if not any(asked):
        raise AssertionError(f"nothing that ran reads the table {op!r}")
    return lambda: under(prepared)


def compare(found: Results, wanted: Results) -> None:
    """Raise ValueError where results are further apart than TOLERANCE."""
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        a, b = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (f, w))
        allowed = TOLERANCE.get(w.dtype, 4e-2) * (b.abs() + b.abs().amax() if b.numel() else b)
        if not bool(((a - b).abs() <= allowed + 1e-12).all()):
            raise ValueError(f"result {i} is off by {float((a - b).abs().max()):.3g}")


def text(tables: Mapping[str, Sequence[Entry]]) -> str:
    """The file's form: an entry a line."""

    def row(entry: Entry) -> str:
        bounds: dict[str, Any] = {"max": dict(entry.bounds)} if entry.bounds else {}
        return "    " + json.dumps({**bounds, "options": dict(entry.options), "measured": entry.measured})

    blocks = [f'  "{op}": [\n' + ",\n".join(map(row, entries)) + "\n  ]" for op, entries in tables.items()]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def write(tables: Mapping[str, Sequence[Entry]], path: Path) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text(tables))
    os.replace(beside, path)


def tune_all(tables: Tables, names: Sequence[str], tuner: Tuner, path: Path) -> None:
    """Tune tables by name; the file is rewritten after each."""
    for op in names:
        tables[op] = tune(op, tables[op], tuner)
        write(tables, path)
        if tuner.extent.device.type == "cuda":
            torch.cuda.empty_cache()


def default_tuner(extent: Extent, timer: Timer, rounds: int, say: Callable[[str], None]) -> Tuner:
    """With the committed candidates."""
    return Tuner(extent, timer, rounds, say, CANDIDATES)
