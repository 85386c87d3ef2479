"""timeline.json: measured steps as a trace that opens in Perfetto and chrome://tracing, and loads again. Pure.

The format is that of chrome://tracing (JSON object format, complete events, flow events). Process 0
has a row per rank with every action, process 1 a row per rank with its waits for receives, split
into the part before the tensor was sent and the part in which it was on its way; arrows lead from each
SEND to the action that takes the tensor. The key ``triloom`` holds what a trace has no place for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .actions import COMPUTE, parse_program
from .errors import ConfigError, ProgramError
from .measured import BEGIN, END, UNTIL, WAITED, Figures, Measurement, Measures, Seat, Times, measures

NAME = "timeline.json"
VERSION = 1
RANKS, RECEIVES = 0, 1
"""Process numbers of the two groups of rows."""


@dataclass(frozen=True)
class Step:
    """A measured step. times: see :mod:`triloom.measured`, on one clock for all steps."""

    number: int
    times: Times
    figures: Figures


@dataclass(frozen=True)
class Trace:
    """What timeline.json holds."""

    measurement: Measurement
    steps: tuple[Step, ...]
    mesh: str
    clock_error_us: tuple[float, ...]
    """Per rank, how far its times may be off those of rank 0."""

    @cached_property
    def typical(self) -> Measures:
        """Medians of the steps."""
        return measures(self.measurement, [step.times for step in self.steps])


def to_json(trace: Trace) -> str:
    """The file: one event a line."""
    m = trace.measurement
    about = {
        "version": VERSION,
        "mesh": trace.mesh,
        "program": m.program.to_csv(),
        "units": m.units,
        "seats": m.seats,
        "clock_error_us": trace.clock_error_us,
        "steps": [{"step": s.number, **s.figures.as_dict()} for s in trace.steps],
    }
    events = ",\n".join(json.dumps(e, separators=(",", ":")) for e in _events(trace))
    return f'{{"displayTimeUnit":"ms","triloom":{json.dumps(about)},\n"traceEvents":[\n{events}\n]}}\n'


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    m = trace.measurement
    yield from _names(m)
    for step in trace.steps:
        for rank, seat in enumerate(m.seats):
            for row, action in enumerate(m.program.ranks[seat.coord]):
                begin, end, waited, until = (int(x) for x in step.times[rank, row])
                name = f"{action.op} {'' if action.microbatch is None else action.microbatch}".strip()
                about = {"action": str(action), "step": step.number, "row": row}
                if waited:
                    about |= {"waited_us": waited / 1e3, "until_us": until / 1e3}
                yield _slice(name, "compute" if action.op in COMPUTE else "other", RANKS, rank, begin, end, about)
        moved = m.transfers(step.times)[1]
        for k, ((rank, row, source, sent), under_way) in enumerate(zip(m.receives.T, moved, strict=True)):
            cells = step.times[rank, row]
            what = str(m.program.ranks[m.seats[source].coord][sent]).removeprefix("SEND:").partition(">")[0]
            begin, middle, end = int(cells[UNTIL] - cells[WAITED]), int(cells[UNTIL] - under_way), int(cells[UNTIL])
            for name, a, b in (("wait", begin, middle), ("transfer", middle, end)):
                if b > a:
                    about = {"tensor": what, "from": int(source), "step": step.number}
                    yield _slice(name, "receive", RECEIVES, int(rank), a, b, about)
            begins = int(step.times[source, sent, BEGIN]), max(int(cells[BEGIN]), int(cells[UNTIL]))
            yield from _arrow(f"{step.number}.{k}", (int(source), int(rank)), begins)


def _slice(name: str, kind: str, process: int, row: int, begin: int, end: int, about: dict[str, Any]) -> dict[str, Any]:
    """A complete event; times in microseconds with three decimals."""
    return {
        "ph": "X", "name": name, "cat": kind, "pid": process, "tid": row,
        "ts": begin / 1e3, "dur": (end - begin) / 1e3, "args": about,
    }  # fmt: skip


def _arrow(number: str, rows: tuple[int, int], at: tuple[int, int]) -> Iterator[dict[str, Any]]:
    common = {"name": "tensor", "cat": "transfer", "id": number, "pid": RANKS}
    yield {"ph": "s", **common, "tid": rows[0], "ts": at[0] / 1e3}
    yield {"ph": "f", "bp": "e", **common, "tid": rows[1], "ts": at[1] / 1e3}


def _names(m: Measurement) -> Iterator[dict[str, Any]]:
    for process, name in ((RANKS, "ranks"), (RECEIVES, "waiting for receives")):
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        yield {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}}
        for rank, seat in enumerate(m.seats):
            row = f"rank {rank} (pp {seat.coord})"
            yield {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": row}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": rank, "args": {"sort_index": rank}}


def save(trace: Trace, folder: Path) -> Path:
    """Write ``timeline.json`` into a folder; returns its path."""
    path = folder / NAME
    path.write_text(to_json(trace), encoding="utf-8")
    return path


def load(run: str | Path) -> Trace:
    """The trace of a run directory, or of the file itself. Raises ConfigError saying what is wrong with it."""
    path = Path(run).expanduser()
    path = path / NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = content["triloom"]
        if about["version"] != VERSION:
            raise ConfigError(f"{str(path)!r} has version {about['version']}, this triloom reads version {VERSION}")
        m = Measurement(
            parse_program(about["program"]),
            tuple(tuple(units) for units in about["units"]),
            tuple(Seat(*seat) for seat in about["seats"]),
        )
        times = _times(m, content["traceEvents"], [s["step"] for s in about["steps"]])
        steps = tuple(
            Step(s["step"], times[s["step"]], Figures(**{k: v for k, v in s.items() if k != "step"}))
            for s in about["steps"]
        )
        return Trace(m, steps, about["mesh"], tuple(about["clock_error_us"]))
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read: {error.strerror}; give the folder of a run that had run.timeline above 0"
        ) from None
    except (ValueError, KeyError, TypeError, IndexError, ProgramError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{str(path)!r} is not a timeline written by triloom train ({what})") from None


def _times(m: Measurement, events: Sequence[dict[str, Any]], steps: Sequence[int]) -> dict[int, Times]:
    out = {step: np.zeros((len(m.seats), m.most, 4), dtype=np.int64) for step in steps}
    for e in events:
        about = e.get("args", {})
        if e["ph"] == "X" and e["pid"] == RANKS:
            cells = out[about["step"]][e["tid"], about["row"]]
            cells[BEGIN] = round(e["ts"] * 1e3)
            cells[END] = cells[BEGIN] + round(e["dur"] * 1e3)
            cells[WAITED] = round(about.get("waited_us", 0) * 1e3)
            cells[UNTIL] = round(about.get("until_us", 0) * 1e3)
    return out
