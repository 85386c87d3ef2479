"""What the generators share: how stages lie on ranks, and a short notation for a rank's row. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

from ..actions import Action, Program, compute, replace_ranks
from ..errors import ConfigError

Schedule = Callable[[int, int], Program]
"""``schedule(ranks, microbatches)``: a Program of compute actions for ``ranks`` pipeline coordinates.

``Program.stages`` says how many stages that takes and which coordinate runs each. Both numbers are at
least 1. Further parameters have defaults; ``functools.partial`` sets them.
"""

Phase = tuple[str, int]
"""Actions in the notation of :func:`write`, and how many times they are repeated."""


def chain(ranks: int) -> tuple[int, ...]:
    """One stage a rank."""
    return tuple(range(ranks))


def looped(ranks: int, chunks: int) -> tuple[int, ...]:
    """``chunks`` stages a rank, dealt in rounds: 0 1 2 0 1 2 (arXiv 2104.04473, section 2.2)."""
    return chain(ranks) * chunks


def v_shaped(ranks: int) -> tuple[int, ...]:
    """Two stages a rank, there and back: 0 1 2 2 1 0. The rank of the first stage has the last one too."""
    return chain(ranks) + chain(ranks)[::-1]


def chunks_of(where: Sequence[int], rank: int) -> tuple[int, ...]:
    """The stages of a rank, in order: its chunk 0, chunk 1, ..."""
    return tuple(s for s, c in enumerate(where) if c == rank)


def write(chunks: Sequence[int], microbatches: int, *phases: Phase) -> tuple[Action, ...]:
    """A rank's row from phases such as ``("F0 B1 W1", 3)``: operation and chunk, repeated.

    The k-th ``F0`` is microbatch k, the k-th ``B0`` or ``BW0`` too, and so for every chunk; what would
    go beyond the last microbatch is left out. ``W0`` is that of the oldest B0 without one, ``W`` that of
    the oldest B of any chunk, nothing if there is none. Ws still missing at the end come last, in the
    order of their Bs. chunks: stage of each chunk; a rank with one chunk needs no number.
    """
    count: Counter[tuple[bool, int]] = Counter()
    pending: list[tuple[int, int]] = []
    row: list[Action] = []

    def add(op: str, chunk: int) -> None:
        line = (op == "F", chunk)
        microbatch = count[line]
        count[line] += 1
        if microbatch < microbatches:
            row.append(compute(op, chunks[chunk], microbatch))
            if op == "B":
                pending.append((chunk, microbatch))

    def settle(chunk: int | None) -> None:
        oldest = next((p for p in pending if chunk in (None, p[0])), None)
        if oldest:
            pending.remove(oldest)
            row.append(compute("W", chunks[oldest[0]], oldest[1]))

    for text, times in phases:
        tokens = [_token(token) for token in text.split()]
        for _ in range(times):
            for op, chunk in tokens:
                if op == "W":
                    settle(chunk)
                else:
                    add(op, chunk or 0)
    while pending:
        settle(None)
    return tuple(row)


@cache
def _token(text: str) -> tuple[str, int | None]:
    """Operation and chunk of ``BW1``; None if there is no chunk."""
    op = text.rstrip("0123456789")
    return op, int(text[len(op) :]) if len(op) < len(text) else None


def forwards(program: Program) -> Program:
    """The forwards of a program in its own order: what evaluation runs on the same stages."""
    rows = ([a for a in row if a.op == "F"] for row in program.ranks)
    return replace_ranks(program, rows, "forward")


def check_sizes(name: str, ranks: int, microbatches: int, **more: int) -> None:
    """Raise ConfigError unless all are positive integers."""
    for what, value in {"ranks": ranks, "microbatches": microbatches, **more}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"schedule {name!r} needs {what} to be a positive integer, got {value!r}")
