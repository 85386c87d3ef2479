"""Timelines as pictures for a paper and as text for a terminal: a row per rank, microbatch numbers in the bars. Pure.

Simulated and measured timelines are drawn alike: both become :class:`Chart` s. Forwards are blue,
backwards green (B, without weight gradients, lighter than BW), weight gradients amber; the second
and later stages of one rank are darker, with white numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import NamedTuple

from .actions import COMPUTE
from .picture import DIGIT, Line, Picture, Rect, Shape, Text


class Bar(NamedTuple):
    """One action on a rank's row."""

    op: str
    """An op of a program, or ``wait`` or ``transfer``."""
    microbatch: int | None
    begin: float
    end: float
    chunk: int = 0
    """Which of its rank's stages this is of."""
    tip: str = ""


@dataclass(frozen=True)
class Chart:
    """A timeline to draw; times count from 0 to ``end`` in ``unit``."""

    title: str
    rows: tuple[tuple[Bar, ...], ...]
    end: float
    subtitle: str = ""
    notes: tuple[str, ...] = ()
    """Per row, a few words to the right of it."""
    unit: str = ""


class Style(NamedTuple):
    fill: str
    later: str
    """The same for the rank's second and later stages."""
    says: str


STYLES = {
    "F": Style("#8cbcf0", "#3c6fb4", "F forward"),
    "BW": Style("#5fb37f", "#27704a", "BW backward"),
    "B": Style("#a3dbb3", "#4f9a68", "B input gradient"),
    "W": Style("#f5c265", "#c07f12", "W weight gradient"),
    "R": Style("#c4aee6", "#7a5cb0", "R recompute"),
    "wait": Style("#e6e6e6", "#e6e6e6", "waiting on receive"),
    "transfer": Style("#dd7f78", "#dd7f78", "transfer"),
}
"""Colours that stay apart in print and for colour-blind readers; the rest of the ops share ``OTHER``."""
OTHER = Style("#9a9a9a", "#9a9a9a", "other actions")

WIDTH = 1000.0
LEFT = 56.0
FULL_ROW, LEAST_ROW = 20.0, 5.0
ROWS_HEIGHT = 420.0
"""Pixels that the rows of a panel may take before they become lower than ``FULL_ROW``."""
SMALLEST = 3.0
"""Size of the smallest numbers: for a screen that zooms, or a page across."""
INK, GREY, BAND = "#222222", "#666666", "#f6f6f6"


def style_of(op: str) -> Style:
    return STYLES.get(op, OTHER)


def draw(charts: Sequence[Chart]) -> Picture:
    """One panel per chart, on one time scale, with a time axis each and a common legend."""
    charts = [c for c in charts if c.rows]
    end = max((c.end for c in charts), default=0.0) or 1.0
    right = 14.0 + 6.2 * max((len(n) for c in charts for n in c.notes), default=0)
    scale = (WIDTH - LEFT - right) / end
    shapes: list[Shape] = []
    y = 10.0
    for chart in charts:
        y = _panel(chart, y, scale, end, shapes)
    y = _legend(charts, y, shapes)
    return Picture(WIDTH, y + 6.0, tuple(shapes))


def _panel(chart: Chart, y: float, scale: float, end: float, shapes: list[Shape]) -> float:
    """Append a chart whose top is at y; returns its bottom."""
    shapes.append(Text(LEFT, y + 12, chart.title, 13, INK, bold=True))
    if chart.subtitle:
        shapes.append(Text(LEFT + 8.6 * len(chart.title) + 14, y + 12, chart.subtitle, 11, GREY))
    top = y + 21
    pitch = max(LEAST_ROW, min(FULL_ROW, ROWS_HEIGHT / len(chart.rows)))
    gap = 2.0 if pitch > 10 else 0.8
    every = math.ceil(9 / pitch)
    sizes = _number_sizes(chart, scale)
    for rank, bars in enumerate(chart.rows):
        row = top + rank * pitch
        shapes.append(Rect(LEFT, row, chart.end * scale, pitch - gap, BAND))
        if rank % every == 0:
            shapes.append(Text(LEFT - 7, row + pitch / 2 + 2.6, f"rank {rank}", 9.5, INK, "end"))
        shapes += _bars(bars, row, pitch - gap, scale, sizes)
        if chart.notes:
            shapes.append(Text(LEFT + end * scale + 8, row + pitch / 2 + 2.6, chart.notes[rank], 9.5, GREY))
    bottom = top + len(chart.rows) * pitch
    shapes.append(Line(LEFT + chart.end * scale, top - 3, LEFT + chart.end * scale, bottom + 3, INK, 1.2))
    return _axis(chart, bottom + 3, scale, end, shapes) + 16


def _bars(
    bars: Sequence[Bar], y: float, height: float, scale: float, sizes: Mapping[str, tuple[int, float]]
) -> Iterator[Shape]:
    for bar in bars:
        width = (bar.end - bar.begin) * scale
        edge = min(0.6, width / 8)  # white between neighbours, without hiding thin bars
        tip = bar.tip or f"{bar.op} {'' if bar.microbatch is None else bar.microbatch}: {bar.begin:g} to {bar.end:g}"
        yield Rect(LEFT + bar.begin * scale, y, max(width - edge, 0.2), height, _fill(bar.op, bar.chunk), tip)
    for bar in bars:
        if bar.microbatch is None or bar.op not in sizes:
            continue
        digits, (most, usual) = str(bar.microbatch), sizes[bar.op]
        size = min(max(usual, 7.5), height * 0.62, _fitting(bar, most, scale))
        if size >= SMALLEST:
            middle = LEFT + (bar.begin + bar.end) / 2 * scale
            yield Text(middle, y + height / 2 + size * 0.36, digits, size, "#ffffff" if bar.chunk else INK, "middle")


def _fitting(bar: Bar, digits: int, scale: float) -> float:
    """The size of so many digits that fills a bar."""
    return ((bar.end - bar.begin) * scale - 1.2) / (DIGIT * digits)


def _number_sizes(chart: Chart, scale: float) -> dict[str, tuple[int, float]]:
    """For each op the digits of its longest number, and the size in which that fits most of its bars."""
    sizes = {}
    for op in COMPUTE:
        bars = [b for row in chart.rows for b in row if b.op == op and b.microbatch is not None]
        if bars:
            digits = max(len(str(b.microbatch)) for b in bars)
            sizes[op] = digits, min(9.5, median(_fitting(b, digits, scale) for b in bars))
    readable = [size for _, size in sizes.values() if size >= SMALLEST]
    return {op: (digits, min(size, 1.3 * min(readable, default=size))) for op, (digits, size) in sizes.items()}


def _fill(op: str, chunk: int) -> str:
    """The colour of an op; beyond a rank's second stage ever darker."""
    style = style_of(op)
    keep = max(0.4, 1.0 - 0.15 * (chunk - 1)) if chunk > 1 else 1.0
    colour = style.later if chunk else style.fill
    return "#" + "".join(f"{round(int(colour[i : i + 2], 16) * keep):02x}" for i in (1, 3, 5))


def _axis(chart: Chart, y: float, scale: float, end: float, shapes: list[Shape]) -> float:
    step = tick_step(end)
    shapes.append(Line(LEFT, y, LEFT + end * scale, y, GREY, 0.8))
    for k in range(int(end / step + 1e-9) + 1):
        x = LEFT + k * step * scale
        shapes.append(Line(x, y, x, y + 4, GREY, 0.8))
        shapes.append(Text(x, y + 14, f"{k * step:g}", 9.5, GREY, "middle"))
    shapes.append(Text(LEFT - 7, y + 14, f"time{f' ({chart.unit})' if chart.unit else ''}", 9.5, GREY, "end"))
    return y + 16


def tick_step(end: float, most: int = 14) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that gives at most ``most`` steps up to ``end``."""
    power = 10.0 ** math.floor(math.log10(end / most))
    return next(step for f in (1, 2, 5, 10) if end / (step := f * power) <= most + 1e-9)


def _legend(charts: Sequence[Chart], y: float, shapes: list[Shape]) -> float:
    ops = {bar.op for c in charts for row in c.rows for bar in row}
    said = [(style.fill, style.says) for op, style in STYLES.items() if op in ops]
    if ops - STYLES.keys():
        said.append((OTHER.fill, OTHER.says))
    if any(bar.chunk for c in charts for row in c.rows for bar in row):
        said.append((STYLES["F"].later, "darker: the rank's later stages"))
    x = LEFT
    for fill, text in said:
        shapes.append(Rect(x, y, 11, 11, fill))
        shapes.append(Text(x + 16, y + 9.5, text, 10.5, INK))
        x += 16 + 6.4 * len(text) + 20
    return y + 16


# ---------------------------------------------------------------- terminal

ANSI = {"F": "44;97", "BW": "42;30", "B": "42;30", "W": "43;30", "R": "45;97", "wait": "2", "transfer": "41;97"}
ANSI_CHUNK = {"F": "104;30", "BW": "102;30", "B": "102;30", "W": "103;30", "R": "105;30"}
"""Colours of a rank's second and later stages."""
MOST_SLOTS = 1200


def terminal(chart: Chart, width: int, *, colour: bool = False) -> str:
    """A row per rank and a cell per slot of time, cut into blocks that are ``width`` characters wide.

    A slot is as long as the shortest compute action; an action fills the slots that it takes, starts with
    the first letter of its op and its microbatch (``F12``, and ``B12===`` for a backward of two slots),
    and ``.`` is idle time. With more than one stage on a rank, letters of its later stages are small.
    """
    slot = _slot(chart)
    cell = 1 + max((len(str(b.microbatch)) for row in chart.rows for b in row if b.microbatch is not None), default=1)
    slots = max(1, math.ceil(chart.end / slot * (1 - 1e-6)))
    rows = [_cells(row, slot, slots, cell) for row in chart.rows]
    label = len(str(len(rows) - 1)) + 6
    per_block = max(1, (width - label) // cell)
    lines: list[str] = []
    for start in range(0, slots, per_block):
        stop = min(slots, start + per_block)
        lines.append(_ruler(start, stop, slot, cell, label, chart.unit))
        for rank, row in enumerate(rows):
            text = "".join(_paint(*c, colour) for c in row[start:stop])
            lines.append(f"{f'rank {rank}':<{label}}{text}".rstrip())
        lines.append("")
    return "\n".join(lines[:-1])


_Cell = tuple[str, str, int]
"""Text, op (empty: idle) and chunk."""


def _slot(chart: Chart) -> float:
    """The shortest action, or half of it if the others are then closer to whole slots."""
    lengths = {round(b.end - b.begin, 12) for row in chart.rows for b in row if b.end > b.begin}
    shortest = min(lengths, default=1.0)
    off = {parts: max((abs(_rest(n * parts / shortest)) for n in lengths), default=0.0) for parts in (1, 2)}
    slot = shortest / (2 if off[1] > 0.25 and off[2] < 0.25 else 1)
    return max(slot, chart.end / MOST_SLOTS) * (1 - 1e-9) or 1.0


def _rest(x: float) -> float:
    return x - math.floor(x + 0.5)


def _cells(bars: Sequence[Bar], slot: float, slots: int, cell: int) -> list[_Cell]:
    out: list[_Cell] = [("." + " " * (cell - 1), "", 0)] * slots
    for bar in bars:
        first = min(slots - 1, math.floor(bar.begin / slot + 0.5))
        stop = min(slots, max(first + 1, math.floor(bar.end / slot + 0.5)))
        letter = bar.op[0].lower() if bar.chunk else bar.op[0]
        text = letter + ("" if bar.microbatch is None else str(bar.microbatch)).ljust(cell - 1)
        text = text.ljust(cell * (stop - first), "=").replace(" ", "=" if stop - first > 1 else " ")
        for i, at in zip(range(first, stop), count(step=cell)):
            out[i] = (text[at : at + cell], bar.op, bar.chunk)
    return out


def _paint(text: str, op: str, chunk: int, colour: bool) -> str:
    code = (ANSI_CHUNK if chunk else ANSI).get(op, "")
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _ruler(start: int, stop: int, slot: float, cell: int, label: int, unit: str) -> str:
    """Times of every tenth slot."""
    out = f"time{f' {unit}' if unit else ''}".ljust(label)[: label - 1].ljust(label)
    for i in range(start, stop, 10):
        room = min(10, stop - i) * cell
        text = f"{i * slot:.4g}"
        out += f"|{text}".ljust(room)[:room] if len(text) < room else " " * room
    return out.rstrip()
