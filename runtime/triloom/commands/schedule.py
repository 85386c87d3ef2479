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
from ..measured import costs_of
from ..program_file import check, has_state, load_program
from ..schedules import NAMED
from ..search import Found, auto
from ..simulate import Costs, Timeline, simulate
from ..trace import load
from .options import describe, read

USAGE = """\
triloom schedule NAME: what a pipeline schedule does, without a single rank.

  triloom schedule 1f1b --stages 8 --micro 32
  triloom schedule zb_h1 --stages 8 --micro 32 --costs 18.5,18.1,9.3,0.6 --compare 1f1b,auto --out zb.svg
  triloom schedule auto --measured runs/20261121-061500 --memory 8 --save auto.csv
  triloom schedule --file mine.csv

Prints the grid and a table, and proves that the program cannot deadlock. Times are in the unit of --costs,
memory counts what one microbatch holds on one rank. NAME is one of:
  {names}
auto searches for the shortest program that fits --memory.

"""

_NOT_NEGATIVE = Rule("numbers of at least 0, that of the forward above 0", lambda v: v[0] > 0 and min(v) >= 0)
_DEFAULT_COSTS = (1.0, 1.0, 1.0, 0.0)
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Section):
    """Options of ``triloom schedule``."""

    stages: Annotated[int | None, at_least(1)] = None
    """Ranks of the pipeline; a schedule with several stages a rank has a multiple of it. 4 if left out."""
    micro: Annotated[int | None, at_least(1)] = None
    """Microbatches. 8 if left out."""
    costs: Annotated[tuple[float, ...] | None, _NOT_NEGATIVE] = None
    """F,B,W,COMM: what a rank's share of the model takes a microbatch, forward, input gradient and weight
    gradient, and the latency of a hop (left out: 0). 1,1,1,0 if left out."""
    measured: str | None = None
    """Take costs, stages and microbatches from this run: medians of its timeline.json, for each stage."""
    memory: Annotated[float | None, above(0)] = None
    """Microbatches that a rank may hold: says which schedules fit, and limits auto."""
    compare: str | None = None
    """Other schedules, by name and separated by commas, for the table and the picture."""
    file: str | None = None
    """A program to show instead of a named one: a row of actions per rank, as --save writes it."""
    save: str | None = None
    """Write the program to this file: to train with (--schedule.file), or to change by hand."""
    out: str | None = None
    """Write a picture to this file, .svg or .png."""
    json: bool = False
    """Print one JSON object instead of grid and table."""


@dataclass(frozen=True)
class Setting:
    """What schedules are made and simulated for."""

    ranks: int
    microbatches: int
    costs: Costs
    split: bool
    """Whether the costs of B and W are known apart."""
    about: dict[str, Any]
    """The costs, for the report."""
    unit: str = ""


@dataclass(frozen=True)
class Shown:
    """A schedule to show. found: what the search says of an automatic one."""

    timeline: Timeline
    found: Found | None = None

    @property
    def name(self) -> str:
        program = self.timeline.program.name
        return AUTO + ("" if program == AUTO else f" = {program}") if self.found else program


def run_schedule(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    if "--help" in words or "-h" in words:
        print(USAGE.format(names=", ".join([*NAMED, AUTO])) + describe(ScheduleOptions), end="")
        return 0
    options, names = read(ScheduleOptions, words)
    if len(names) + (options.file is not None) != 1:
        got = " ".join([*names, *(["--file", options.file] if options.file else [])]) or "nothing"
        raise ConfigError(f"triloom schedule shows one schedule, NAME or --file FILE, and got {got}; see --compare")
    if options.out:
        picture.check_name(Path(options.out))
    program = None if options.file is None else _from_file(options.file, options)
    setting = _setting(options, program)
    others = [name.strip() for name in (options.compare or "").split(",") if name.strip()]
    for name in [*names, *others]:
        check_known(name)
    shown = [] if program is None else [Shown(_simulated(program, setting))]
    shown += [_shown(name, setting, options.memory) for name in [*names, *others]]
    if options.json:
        print(json.dumps(report(shown, setting, options.memory)))
    else:
        print(_text(shown, setting, options.memory))
    if options.save:
        _save(shown[0].timeline.program, Path(options.save))
    if options.out:
        picture.save(draw([chart_of(s.timeline, s.name, setting.unit) for s in shown]), Path(options.out))
    return 0


def check_known(name: str) -> None:
    """Raise ConfigError, with a suggestion, for a name that is no schedule."""
    if name not in (*NAMED, AUTO):
        near = suggest(name, (*NAMED, AUTO)) or "; schedules are " + ", ".join((*NAMED, AUTO))
        raise ConfigError(f"{name!r} is not a schedule{near}")


def _from_file(file: str, options: ScheduleOptions) -> Program:
    """The program of a file, proven. Raises ConfigError or ProgramError naming the file."""
    program = load_program(file)
    if has_state(program):
        raise ConfigError(
            f"{file} has actions on the training state, which only a model gives a meaning; triloom train "
            "--schedule.file runs it, and what is shown here is its compute actions and transfers alone"
        )
    there = {"stages": len(program.ranks), "micro": program.microbatches}
    for what, wanted in (("stages", options.stages), ("micro", options.micro)):
        if wanted not in (None, there[what]):
            raise ConfigError(f"--{what} {wanted}: the program in {file} has {there[what]}; leave --{what} out")
    try:
        check(program)
    except ProgramError as error:
        raise ProgramError(f"{file}: {error}") from None
    return program


def _setting(options: ScheduleOptions, program: Program | None) -> Setting:
    ranks = options.stages or (len(program.ranks) if program else 4)
    microbatches = options.micro or (program.microbatches if program else 8)
    if options.measured is None:
        costs = options.costs or _DEFAULT_COSTS
        about: dict[str, Any] = dict(zip(("F", "B", "W", "comm"), (*costs, 0.0), strict=False))
        return Setting(ranks, microbatches, cost_model(costs), True, about)
    if options.costs is not None:
        raise ConfigError("--costs and --measured both say what actions take; give one of them")
    trace = load(options.measured)
    typical = trace.typical
    order = trace.measurement.program
    ranks = options.stages or (len(program.ranks) if program else len(order.ranks))
    microbatches = options.micro or (program.microbatches if program else order.microbatches)
    about = {**{op: list(times) for op, times in typical.computes.items()}, "comm": typical.comm}
    return Setting(ranks, microbatches, costs_of(typical), typical.split, about, "ms")


def cost_model(costs: Sequence[float]) -> Costs:
    """Costs of ``F,B,W`` or ``F,B,W,COMM``."""
    if len(costs) not in (3, 4):
        text = ",".join(f"{c:g}" for c in costs)
        raise ConfigError(f"--costs {text}: three or four numbers are needed, F,B,W or F,B,W,COMM, as in 1,1,1,0")
    return Costs(F=costs[0], B=costs[1], W=costs[2], comm=costs[3] if len(costs) > 3 else 0.0)


def _shown(name: str, setting: Setting, memory: float | None) -> Shown:
    if name == AUTO:
        found = auto(setting.ranks, setting.microbatches, setting.costs, memory=memory, split=setting.split)
        check(found.program)
        return Shown(found.timeline, found)
    program = NAMED[name](setting.ranks, setting.microbatches)
    check(program)
    return Shown(_simulated(program, setting))


def _simulated(program: Program, setting: Setting) -> Timeline:
    if not setting.split and any(a.op in ("B", "W") for row in program.ranks for a in row):
        raise ConfigError(
            f"{program.name} splits B from W, and the run measured BW, both in one; measure a run with a schedule "
            "that splits them, such as --schedule.kind zb_h1"
        )
    return simulate(program, setting.costs)


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


def report(shown: Sequence[Shown], setting: Setting, memory: float | None) -> dict[str, Any]:
    """Everything the text says, for JSON: ``costs``, ``memory`` and the figures of each schedule."""
    return {"costs": setting.about, "memory": memory, "schedules": [_figures(s, memory) for s in shown]}


def _figures(shown: Shown, memory: float | None) -> dict[str, Any]:
    figures = shown.timeline.figures()
    if memory is not None:
        figures["fits"] = max(shown.timeline.peak) <= memory * (1 + 1e-9)
    if shown.found is not None:
        figures |= {"bound": shown.found.bound, "gap": shown.found.gap, "best_named": shown.found.best_named}
    return figures


def _text(shown: Sequence[Shown], setting: Setting, memory: float | None) -> str:
    first = shown[0].timeline
    program = first.program
    sizes = f"{len(program.ranks)} ranks, {len(program.stages)} stages, {program.microbatches} microbatches"
    width = shutil.get_terminal_size((120, 40)).columns
    grid = terminal(chart_of(first, unit=setting.unit), width, colour=sys.stdout.isatty())
    searched = [
        f"auto: {s.found.woven} orders tried; no program is shorter than {s.found.bound:.6g}, this one is "
        f"{s.found.gap:.1%} above"
        for s in shown
        if s.found is not None
    ]
    return "\n".join([f"{shown[0].name}: {sizes}", "", grid, "", *_table(shown, memory), *searched])


COLUMNS = ("schedule", "makespan", "bubble", "bubble_span", "bubble_ideal", "peak", "peak of each rank")
MEANINGS = (
    "bubble: of the total time, 1 - busy / (ranks x makespan)",
    "bubble_span: (cost - ideal) / cost, cost being the longest span of one rank (Zero Bubble paper)",
    "bubble_ideal: (makespan - ideal) / ideal, over the ideal time of the busiest rank",
    "peak: microbatches held at once on a rank, from F to B and from B to W",
)


def _table(shown: Sequence[Shown], memory: float | None) -> list[str]:
    rows: list[tuple[str, ...]] = [COLUMNS if memory is None else (*COLUMNS, f"fits {memory:g}")]
    for s in shown:
        f = _figures(s, memory)
        bubbles = (f"{f[form]:.4f}" for form in ("bubble", "bubble_span", "bubble_ideal"))
        row = (s.name, f"{f['makespan']:.6g}", *bubbles, f"{max(f['peak']):.4g}", _peaks(f["peak"]))
        rows.append(row if memory is None else (*row, "yes" if f["fits"] else "no"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *MEANINGS]


def _peaks(peaks: Sequence[float], most: int = 16) -> str:
    shown = " ".join(f"{p:.3g}" for p in peaks[:most])
    return shown + (f" ... ({len(peaks)} ranks)" if len(peaks) > most else "")
