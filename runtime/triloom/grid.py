"""The rank-by-step grid of a program as text, with marked actions: what a refusal shows. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .actions import Program

Place = tuple[int, int]
"""Pipeline coordinate and step (place in its list) of an action."""

MAX_RANKS = 6
MAX_STEPS = 24
CONTEXT = 5
"""Steps shown before and after the marked ones when a rank's list is too long."""


def grid(program: Program, marks: Iterable[Place] = ()) -> str:
    """One column per pipeline coordinate, one row per step; marked actions carry ``>>``.

    A large program is cut: to the ranks with marks and their neighbours, and each rank to the
    steps around its marks. Every cell names its own step, because columns may start at different ones.
    """
    places = sorted(set(marks))
    ranks = _ranks_shown(len(program.ranks), places)
    columns = [_column(program, rank, [s for r, s in places if r == rank]) for rank in ranks]
    height = max(map(len, columns), default=0)
    widths = [max(map(len, column), default=0) for column in columns]
    lines = [
        "  ".join(
            (column[i] if i < len(column) else "").ljust(width) for column, width in zip(columns, widths, strict=True)
        )
        for i in range(height)
    ]
    hidden = len(program.ranks) - len(ranks)
    if hidden:
        lines.append(f"({hidden} of {len(program.ranks)} ranks not shown)")
    return "\n".join(line.rstrip() for line in lines)


def _ranks_shown(size: int, places: Sequence[Place]) -> list[int]:
    if size <= MAX_RANKS:
        return list(range(size))
    marked = sorted({r for r, _ in places})
    near = sorted(
        (r for r in range(size) if r not in marked), key=lambda r: min((abs(r - m) for m in marked), default=r)
    )
    return sorted((marked + near)[:MAX_RANKS])


def _column(program: Program, rank: int, marks: Sequence[int]) -> list[str]:
    row = program.ranks[rank]
    start, stop = _window(len(row), marks)
    digits = len(str(len(row)))
    cells = [f"rank {rank}"]
    cells += ["   ..."] if start else []
    cells += [f"{'>>' if s in marks else '  '} {s:>{digits}} {row[s]}" for s in range(start, stop)]
    return cells + (["   ..."] if stop < len(row) else [])


def _window(length: int, marks: Sequence[int]) -> tuple[int, int]:
    if length <= MAX_STEPS:
        return 0, length
    if not marks:
        return 0, 2 * CONTEXT + 1
    start = max(0, min(marks) - CONTEXT)
    return start, min(length, max(marks) + CONTEXT + 1, start + MAX_STEPS)
