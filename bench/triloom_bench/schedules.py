"""Schedules on paper: how fast the simulator is, and how far the search is from its bound and from the papers.

What it moves: nothing, one process computes. Simulator: seconds per program and microseconds per
action over ranks and microbatches, best of three; linear means that the last column stays. Search:
makespans over the lower bound for the best named schedule that fits the memory and for ``auto``, and
the processor seconds of the search. Equal costs F = B = W = 1, hops and memory as stated; memory in
multiples of 1F1B's.

    python -m triloom_bench.schedules
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import TypeVar

from triloom.schedules import NAMED
from triloom.search import auto
from triloom.simulate import Costs, simulate

T = TypeVar("T")

SIZES = ((16, 64), (64, 256), (256, 256), (1024, 256))
"""Ranks and microbatches."""
SEARCHES = tuple(
    (p, m, memory, comm) for p, m in ((4, 8), (8, 32), (16, 64)) for memory in (0.5, 1.0, 2.0) for comm in (0.0, 0.1)
)
"""Ranks, microbatches, memory over 1F1B's, latency of a hop."""


def timed(run: Callable[[], T], times: int = 3) -> tuple[float, T]:
    """Processor seconds of the fastest run, and its result."""
    best = inf
    for _ in range(times):
        begin = time.process_time()
        result = run()
        best = min(best, time.process_time() - begin)
    return best, result


def simulator() -> None:
    print(f"{'schedule':12}{'ranks':>7}{'micro':>7}{'actions':>10}{'seconds':>10}{'us/action':>11}")
    for name in ("1f1b", "zb_h1", "zb_v"):
        for p, m in SIZES:
            program = NAMED[name](p, m)
            actions = sum(map(len, program.ranks))
            seconds, _ = timed(lambda program=program: simulate(program))  # type: ignore[misc]
            print(f"{name:12}{p:7}{m:7}{actions:10}{seconds:10.3f}{1e6 * seconds / actions:11.2f}")


def search() -> None:
    head = f"{'best named':12}{'/bound':>8}{'auto/bound':>12}{'seconds':>9}"
    print(f"{'ranks':>5}{'micro':>7}{'memory':>8}{'hop':>6}  {head}")
    for p, m, memory, comm in SEARCHES:
        costs, limit = Costs(comm=comm), memory * min(p, m)
        seconds, found = timed(lambda costs=costs, limit=limit, p=p, m=m: auto(p, m, costs, memory=limit), 1)  # type: ignore[misc]
        named = found.best_named or "-"
        over = simulate(NAMED[named](p, m), costs).makespan / found.bound if found.best_named else inf
        print(
            f"{p:5}{m:7}{memory:8}{comm:6}  {named:12}{over:8.4f}"
            f"{found.timeline.makespan / found.bound:12.4f}{seconds:9.2f}"
        )


def main() -> None:
    simulator()
    print()
    search()


if __name__ == "__main__":
    main()
