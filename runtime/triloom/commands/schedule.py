"""``triloom schedule``: a schedule as a grid, a table of figures, JSON and a picture. Needs no ranks and no torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .. import picture
from ..actions import Program
from ..config.rules import Rule, above, at_least, suggest
from ..config.schema import Section
from ..draw import Bar, Chart, draw, terminal
from ..errors import ConfigError, ProgramError
from ..program_file import check, load_program, with_transfers
from ..schedules import NAMED
from ..simulate import Costs, Timeline, simulate
from .options import describe, read

USAGE = """\
triloom schedule NAME: what a pipeline schedule does, without a single rank.

  triloom schedule 1f1b --stages 8 --micro 32
  triloom schedule zb_h1 --stages 8 --micro 32 --costs 18.5,18.1,9.3,0.6 --compare 1f1b --out zb.svg
  triloom schedule --file mine.csv

Prints the grid and a table, and proves that the program cannot deadlock. Times are in the unit of --costs,
memory counts what one microbatch holds on one rank. NAME is one of:
  {names}

"""

_NOT_NEGATIVE = Rule("numbers of at least 0, that of the forward above 0", lambda v: v[0] > 0 and min(v) >= 0)


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Section):
    """Options of ``triloom schedule``."""

    stages: Annotated[int | None, at_least(1)] = None
    """Ranks of the pipeline; a schedule with several stages a rank has a multiple of it. 4 if left out."""
    micro: Annotated[int | None, at_least(1)] = None
    """Microbatches. 8 if left out."""
    costs: Annotated[tuple[float, ...], _NOT_NEGATIVE] = (1.0, 1.0, 1.0, 0.0)
    """F,B,W,COMM: what a rank's share of the model takes a microbatch, forward, input gradient and weight
    gradient, and the latency of a hop (left out: 0)."""
    memory: Annotated[float | None, above(0)] = None
    """Microbatches that a rank may hold: says which schedules fit."""
    compare: str | None = None
    """Other schedules, by name and separated by commas, for the table and the picture."""
    file: str | None = None
    """A program to show instead of a named one: a row of actions per rank (see triloom.program_file)."""
    save: str | None = None
    """Write the program to this file, with its transfers: a start for one written by hand."""
    out: str | None = None
    """Write a picture to this file, .svg or .png."""
    json: bool = False
    """Print one JSON object instead of grid and table."""


def run_schedule(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if "--help" in words or "-h" in words:
        print(USAGE.format(names=", ".join(NAMED)) + describe(ScheduleOptions), end="")
        return 0
    options, names = read(ScheduleOptions, words)
    if options.out:
        picture.check_name(Path(options.out))
    costs = cost_model(options.costs)
    programs = _programs(options, names)
    for i, program in enumerate(programs):
        prove(program, options.file if i == 0 else None)
    timelines = [simulate(p, costs) for p in programs]
    if options.json:
        print(json.dumps(report(timelines, options.costs, options.memory)))
    else:
        print(_text(timelines, options))
    if options.save:
        _save(with_transfers(programs[0]), Path(options.save))
    if options.out:
        picture.save(draw([chart_of(t) for t in timelines]), Path(options.out))
    return 0


def cost_model(costs: Sequence[float]) -> Costs:
    """Costs of ``F,B,W`` or ``F,B,W,COMM``."""
    if len(costs) not in (3, 4):
        text = ",".join(f"{c:g}" for c in costs)
        raise ConfigError(f"--costs {text}: three or four numbers are needed, F,B,W or F,B,W,COMM, as in 1,1,1,0")
    return Costs(F=costs[0], B=costs[1], W=costs[2], comm=costs[3] if len(costs) > 3 else 0.0)


def find_schedule(name: str) -> Any:
    """The generator of a name. Raises ConfigError with a suggestion."""
    if name not in NAMED:
        near = suggest(name, NAMED)
        raise ConfigError(f"{name!r} is not a schedule{near or '; schedules are ' + ', '.join(NAMED)}")
    return NAMED[name]


def _programs(options: ScheduleOptions, names: Sequence[str]) -> list[Program]:
    """The program asked for, and those to compare it with."""
    if len(names) + (options.file is not None) != 1:
        got = " ".join([*names, *(["--file", options.file] if options.file else [])]) or "nothing"
        raise ConfigError(f"triloom schedule shows one schedule, NAME or --file FILE, and got {got}; see --compare")
    others = [name.strip() for name in (options.compare or "").split(",") if name.strip()]
    makers = [find_schedule(name) for name in [*names, *others]]
    programs = []
    stages, micro = options.stages or 4, options.micro or 8
    if options.file is not None:
        program = load_program(options.file)
        for what, wanted, there in (
            ("stages", options.stages, len(program.ranks)),
            ("micro", options.micro, program.microbatches),
        ):
            if wanted not in (None, there):
                raise ConfigError(f"--{what} {wanted}: the program in {options.file} has {there}; leave --{what} out")
        programs.append(program)
        stages, micro = len(program.ranks), program.microbatches
    return programs + [make(stages, micro) for make in makers]


def prove(program: Program, file: str | None = None) -> None:
    """Verify a program; a refusal of one from a file names the file."""
    try:
        check(program)
    except ProgramError as error:
        raise ProgramError(f"{file}: {error}" if file else str(error)) from None


def _save(program: Program, path: Path) -> None:
    try:
        path.write_text(program.to_csv(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--save {str(path)!r} cannot be written: {error.strerror}") from None


# ---------------------------------------------------------------- what is shown


def chart_of(timeline: Timeline, title: str | None = None, unit: str = "") -> Chart:
    """The computes of a simulated timeline, ready to draw."""
    program = timeline.program
    rows = tuple(
        tuple(
            Bar(
                span.action.op,
                span.action.microbatch,
                span.begin,
                span.end,
                chunk_of(program, span.action.subject.index or 0) if span.action.subject.kind == "stage" else 0,
                f"{span.action}: {span.begin:.6g} to {span.end:.6g}",
            )
            for span in row
            if span.end > span.begin
        )
        for row in timeline.ranks
    )
    figures = f"makespan {timeline.makespan:.5g}{unit and ' ' + unit}, bubble {timeline.bubble:.1%} of total time"
    notes = tuple(f"peak {peak:.3g}" for peak in timeline.peak)
    return Chart(title or program.name, rows, timeline.makespan, figures, notes, unit)


def chunk_of(program: Program, stage: int) -> int:
    """Place of a stage among those of its coordinate."""
    return program.stages[:stage].count(program.stages[stage])


def report(timelines: Sequence[Timeline], costs: Sequence[float], memory: float | None) -> dict[str, Any]:
    """Everything the text says, for JSON: ``costs``, ``memory`` and the figures of each schedule."""
    out = []
    for t in timelines:
        figures = t.figures()
        if memory is not None:
            figures["fits"] = max(t.peak) <= memory
        out.append(figures)
    return {"costs": dict(zip(("F", "B", "W", "comm"), costs, strict=False)), "memory": memory, "schedules": out}


def _text(timelines: Sequence[Timeline], options: ScheduleOptions) -> str:
    first = timelines[0]
    program = first.program
    sizes = f"{len(program.ranks)} ranks, {len(program.stages)} stages, {program.microbatches} microbatches"
    width = shutil.get_terminal_size((120, 40)).columns
    grid = terminal(chart_of(first), width, colour=sys.stdout.isatty())
    return "\n".join([f"{program.name}: {sizes}", "", grid, "", *_table(timelines, options.memory)])


COLUMNS = ("schedule", "makespan", "bubble", "bubble_span", "bubble_ideal", "peak", "peak of each rank")
MEANINGS = (
    "bubble: of the total time, 1 - busy / (ranks x makespan)",
    "bubble_span: (cost - ideal) / cost, cost being the longest span of one rank (Zero Bubble paper)",
    "bubble_ideal: (makespan - ideal) / ideal, over the ideal time of the busiest rank",
    "peak: microbatches held at once on a rank, from F to B and from B to W",
)


def _table(timelines: Sequence[Timeline], memory: float | None) -> list[str]:
    rows: list[tuple[str, ...]] = [COLUMNS if memory is None else (*COLUMNS, f"fits {memory:g}")]
    for t in timelines:
        row = (
            t.program.name, f"{t.makespan:.6g}", f"{t.bubble:.4f}", f"{t.bubble_span:.4f}", f"{t.bubble_ideal:.4f}",
            f"{max(t.peak):.4g}", _peaks(t.peak),
        )  # fmt: skip
        rows.append(row if memory is None else (*row, "yes" if max(t.peak) <= memory else "no"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *MEANINGS]


def _peaks(peaks: Sequence[float], most: int = 16) -> str:
    shown = " ".join(f"{p:.3g}" for p in peaks[:most])
    return shown + (f" ... ({len(peaks)} ranks)" if len(peaks) > most else "")
