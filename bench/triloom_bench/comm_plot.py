"""Bus bandwidth over size, a panel for each operation, from the rows of a comm bench. Both axes are logarithmic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from triloom.picture import Line, Picture, Shape, Text, save

WIDTH, HEIGHT, COLUMNS = 320.0, 220.0, 3
LEFT, RIGHT, TOP, BOTTOM = 48.0, 14.0, 30.0, 34.0
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#7f7f7f", "#17becf", "#8c564b")
GRID = "#dddddd"

Row = Mapping[str, Any]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the picture; nothing to draw gives an empty one."""
    save(picture(rows), path)


def picture(rows: Sequence[Row]) -> Picture:
    """The fp32 rows that moved something; of one rank, whose bus bandwidth is none, GB/s of the buffer."""
    by_operation: dict[str, list[Row]] = {}
    for row in rows:
        if row["setup"].get("dtype") == "fp32":
            by_operation.setdefault(row["setup"]["operation"], []).append(row)
    names = list(dict.fromkeys(who for some in by_operation.values() for row in some for who in row["contenders"]))
    shapes: list[Shape] = []
    for i, (operation, some) in enumerate(by_operation.items()):
        shapes += _panel(operation, some, names, i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT)
    lines = max(1, -(-len(by_operation) // COLUMNS))
    return Picture(WIDTH * COLUMNS, HEIGHT * lines + 24, (*shapes, *_legend(names, HEIGHT * lines + 12)))


def _rate(row: Row, who: str) -> float:
    """GB/s."""
    setup, us = row["setup"], row["setup"]["us_a_call"][who]
    rate: float = row["contenders"][who]["rate"]
    return rate if setup["ranks"] > 1 else setup["bytes"] / us / 1e3


def _panel(operation: str, rows: Sequence[Row], names: Sequence[str], x0: float, y0: float) -> list[Shape]:
    points = {
        who: [(row["setup"]["bytes"], max(_rate(row, who), 1e-9)) for row in rows if who in row["contenders"]]
        for who in names
    }
    every = [point for some in points.values() for point in some]
    sizes = sorted({size for size, _ in every})
    low = math.floor(math.log10(min(rate for _, rate in every)))
    high = max(low + 1, math.ceil(math.log10(max(rate for _, rate in every))))
    span = max(1e-9, math.log2(sizes[-1] / sizes[0]))

    def at(size: float, rate: float) -> tuple[float, float]:
        across, up = math.log2(size / sizes[0]) / span, (math.log10(rate) - low) / (high - low)
        return x0 + LEFT + across * (WIDTH - LEFT - RIGHT), y0 + HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    shapes: list[Shape] = [Text(x0 + LEFT, y0 + TOP - 10, f"{operation}, GB/s", 12, bold=True)]
    for power in range(low, high + 1):
        (left, y), (right, _) = at(sizes[0], 10.0**power), at(sizes[-1], 10.0**power)
        shapes += [Line(left, y, right, y, GRID), Text(left - 5, y + 4, f"{10.0**power:g}", 9, anchor="end")]
    for size in sizes:
        x, y = at(size, 10.0**low)
        shapes += [Line(x, y, x, y + 4, "#888888"), Text(x, y + 15, _bytes(size), 9, anchor="middle")]
    for colour, who in zip(_colours(names), names, strict=True):
        drawn = [at(size, rate) for size, rate in sorted(points[who])]
        shapes += [Line(*a, *b, colour, 1.8) for a, b in pairwise(drawn)]
    return shapes


def _legend(names: Sequence[str], y: float) -> list[Shape]:
    shapes: list[Shape] = []
    for i, (colour, who) in enumerate(zip(_colours(names), names, strict=True)):
        x = LEFT + 130 * i
        shapes += [Line(x, y - 4, x + 20, y - 4, colour, 1.8), Text(x + 26, y, who, 11)]
    return shapes


def _colours(names: Sequence[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _bytes(n: int) -> str:
    power = min(3, int(math.log2(max(1, n)) // 10))
    return f"{n >> 10 * power}{('', 'K', 'M', 'G')[power]}"
