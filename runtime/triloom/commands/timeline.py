"""``triloom timeline``: a measured step under the simulation of the same program, and where they differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .. import picture
from ..actions import COMPUTE
from ..config.rules import at_least
from ..config.schema import Section
from ..draw import Bar, Chart, draw
from ..errors import ConfigError
from ..measured import BEGIN, Measurement, Measures, Times, costs_of, differences, rank_table
from ..simulate import Timeline, simulate
from ..trace import Step, Trace, load
from .options import describe, read
from .schedule import chart_of, chunk_of

USAGE = """\
triloom timeline RUN: a measured step of a run, under the simulation of the same program.

  triloom timeline runs/20261121-061500
  triloom timeline runs/20261121-061500 --step 199 --out step.png

The simulation takes the median of each action's measured times in each stage, and the latency measured
where a rank was waiting already. What is left between the two is named, the largest first. RUN is a run
directory, or a timeline.json; the picture is written next to it unless --out says where.

"""


@dataclass(frozen=True, kw_only=True)
class TimelineOptions(Section):
    """Options of ``triloom timeline``."""

    step: Annotated[int | None, at_least(0)] = None
    """Number of the step; the last one if left out."""
    replica: Annotated[int, at_least(0)] = 0
    """Which of the pipelines side by side (data and tensor parallelism) is shown."""
    most: Annotated[int, at_least(0)] = 8
    """How many differences are named."""
    out: str | None = None
    """Write the picture to this file, .svg or .png; RUN/timeline.svg if left out."""
    json: bool = False
    """Print one JSON object instead of text."""


def run_timeline(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if "--help" in words or "-h" in words:
        print(USAGE + describe(TimelineOptions), end="")
        return 0
    options, runs = read(TimelineOptions, words)
    if len(runs) != 1:
        raise ConfigError(f"triloom timeline takes one run directory, got {' '.join(runs) or 'nothing'}")
    trace = load(runs[0])
    m = trace.measurement
    replicas = 1 + max(seat.replica for seat in m.seats)
    if options.replica >= replicas:
        raise ConfigError(f"--replica {options.replica}: the run has {replicas} pipelines, numbered from 0")
    step = find_step(trace, options.step)
    out = Path(options.out) if options.out else _beside(Path(runs[0]))
    picture.check_name(out)
    typical = trace.typical
    simulated = simulate(m.order, costs_of(typical))
    picture.save(draw(charts(trace, step, simulated, options.replica)), out)
    about = report(trace, step, typical, simulated, options)
    if options.json:
        print(json.dumps(about))
    else:
        print("\n".join([*_text(about), f"{out}"]))
    return 0


def _beside(run: Path) -> Path:
    return (run if run.is_dir() else run.parent) / "timeline.svg"


def find_step(trace: Trace, number: int | None) -> Step:
    """The step of that number, or the last one. Raises ConfigError naming those there are."""
    for step in trace.steps:
        if number is None and step is trace.steps[-1]:
            return step
        if step.number == number:
            return step
    there = ", ".join(str(s.number) for s in trace.steps)
    raise ConfigError(f"--step {number} is not in the timeline; it has {there} (run.timeline sets how many are kept)")


# ---------------------------------------------------------------- pictures


def charts(trace: Trace, step: Step, simulated: Timeline, replica: int) -> list[Chart]:
    """The simulated and the measured pipeline, on one time scale."""
    figures = step.figures
    parts = " + ".join(f"{name} {getattr(figures, name):.1%}" for name in ("idle", "receive", "transfer", "other"))
    rows = measured_rows(trace.measurement, step.times, replica)
    end = max((bar.end for row in rows for bar in row), default=figures.ms)
    about = f"{figures.ms:.5g} ms, bubble {figures.bubble:.1%} = {parts}"
    return [
        chart_of(simulated, f"simulated {trace.measurement.program.name}", "ms"),
        Chart(f"measured, step {step.number}", rows, end, about, unit="ms"),
    ]


def measured_rows(m: Measurement, times: Times, replica: int) -> tuple[tuple[Bar, ...], ...]:
    """Bars of each rank of a pipeline, from the begin of the first compute of any rank up to its own last one:
    computes without their waits, the waits, and the other actions."""
    zero = int(times[..., BEGIN][m.computes].min())
    under_way = {(int(r), int(i)): int(ns) for (r, i), ns in zip(*m.transfers(times), strict=True)}
    rows = []
    for rank, seat in enumerate(m.seats):
        if seat.replica == replica:
            last = m.wholes[seat.coord][-1].rows[-1]
            cells = [times[rank, row] - [zero, zero, 0, zero] for row in range(last + 1)]
            bars = (_bars(m, seat.coord, row, cells[row], under_way.get((rank, row), 0)) for row in range(last + 1))
            rows.append(tuple(bar for some in bars for bar in some if bar.begin >= 0))
    return tuple(rows)


def _bars(m: Measurement, coord: int, row: int, cells: Times, under_way: int) -> list[Bar]:
    action = m.program.ranks[coord][row]
    begin, end, waited, until = cells / 1e6
    tip = f"{action}: {begin:.3f} to {end:.3f} ms"
    if action.op not in COMPUTE:
        return [Bar(action.op, None, begin, end, 0, tip)]
    chunk = chunk_of(m.program, m.stage_of(action))
    if not waited:
        return [Bar(action.op, action.microbatch, begin, end, chunk, tip)]
    sent = until - under_way / 1e6
    marks = [Bar("wait", None, until - waited, sent), Bar("transfer", None, sent, until)]
    waits = [
        bar._replace(tip=f"{bar.op} of {bar.end - bar.begin:.3f} ms in {tip}") for bar in marks if bar.end > bar.begin
    ]
    return [*waits, Bar(action.op, action.microbatch, until, end, chunk, tip)]


# ---------------------------------------------------------------- words


def report(
    trace: Trace, step: Step, typical: Measures, simulated: Timeline, options: TimelineOptions
) -> dict[str, Any]:
    """Everything the text says, for JSON; times in milliseconds."""
    m = trace.measurement
    largest = differences(m, step.times, typical, options.replica, options.most)
    return {
        "program": m.program.name,
        "mesh": trace.mesh,
        "step": step.number,
        "measured": step.figures.as_dict(),
        "simulated": simulated.figures(),
        "costs": {**{op: list(times) for op, times in typical.computes.items()}, "comm": typical.comm},
        "ranks": rank_table(m, step.times, options.replica),
        "clock_error_us": max(trace.clock_error_us),
        "differences": [{"ms": d.ms, "what": d.text} for d in largest],
    }


def _text(about: dict[str, Any]) -> list[str]:
    measured, simulated = about["measured"], about["simulated"]
    over = measured["ms"] / simulated["makespan"] - 1 if simulated["makespan"] else 0.0
    lines = [
        f"{about['program']} on {about['mesh']}, step {about['step']}, milliseconds "
        f"(clocks agree within {about['clock_error_us']:.0f} us)",
        f"measured   {measured['ms']:9.3f}  bubble {measured['bubble']:.4f} = idle {measured['idle']:.4f} + receive "
        f"{measured['receive']:.4f} + transfer {measured['transfer']:.4f} + other {measured['other']:.4f}",
        f"simulated  {simulated['makespan']:9.3f}  bubble {simulated['bubble']:.4f}  (measured is {over:+.1%})",
        "",
        "rank       busy   receive  transfer      rest",
    ]
    for row in about["ranks"]:
        cells = "".join(f"{row[name]:10.3f}" for name in ("busy", "receive", "transfer", "rest"))
        lines.append(f"{row['rank']:<5}{cells}")
    lines += ["", "largest differences to the simulation:" if about["differences"] else "no differences"]
    return [*lines, *(f"  {d['ms']:+9.3f}  {d['what']}" for d in about["differences"]), ""]
