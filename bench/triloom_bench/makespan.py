"""Measured against simulated: how long a pipelined step took, over what the simulator makes of its medians.

What it moves: one activation and one gradient a boundary and microbatch. Units are compute-bound: the large
size of the step benches. Per schedule, ``--rounds`` steps are measured after two that are not; the costs of the
simulation are the medians of F, B, W (or BW) of each stage and of a hop, over all of them. Reported is the
median over the steps of measured / simulated makespan, its range, and the measured and simulated bubble.

Run: ``python -m triloom_bench makespan``, or ``mpirun -n 2 python -m triloom_bench.makespan [--size large]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from triloom import boot
from triloom.boot import World
from triloom.measured import costs_of, measurement, measures
from triloom.simulate import simulate
from triloom.spans import Spans, align, clock_offsets, gather_rows

from .step import OURS, Ours, engine_of, step_of
from .work import MICROBATCHES, SIZES, Setting, Size, make_batches

WARMUP = 2
SCHEDULES = tuple(name for name in OURS if name != "auto")


def measure(name: str, size: Size, world: World, rounds: int) -> dict[str, object]:
    """One schedule; the same on every rank."""
    spans = Spans()
    ours = Ours(pp=world.size, microbatches=MICROBATCHES, schedule=name, chunks=OURS[name])
    engine = engine_of(size, world, ours, spans)
    step = step_of(engine, Setting(size, world, make_batches(size, size.pipeline_batch), None))
    run = measurement(engine.program, engine.stage_units, engine.mesh)
    clocks = clock_offsets(world.group)
    times = []
    for i in range(WARMUP + rounds):
        step(i)
        if i >= WARMUP:
            times.append(align(gather_rows(world.group, spans.rows(), run.most), clocks))
    engine.close()
    timeline = simulate(run.order, costs_of(measures(run, times)))
    figures = [run.figures(t) for t in times]
    ratios = [f.ms / timeline.makespan for f in figures]
    return {
        "schedule": name, "size": size.name, "ranks": world.size, "microbatches": MICROBATCHES, "rounds": rounds,
        "measured_ms": statistics.median(f.ms for f in figures), "simulated_ms": timeline.makespan,
        "measured_over_simulated": statistics.median(ratios), "range": [min(ratios), max(ratios)],
        "bubble_measured": statistics.median(f.bubble for f in figures), "bubble_simulated": timeline.bubble,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the results, beside the lines on standard output")
    options = parser.parse_args()
    with boot.init(threads=1) as world:
        rows = [measure(name, SIZES[options.size], world, options.rounds) for name in SCHEDULES]
        if world.rank == 0:
            for row in rows:
                print(
                    f"{row['schedule']:12} measured / simulated {row['measured_over_simulated']:.3f}, "
                    f"bubble {row['bubble_measured']:.3f} measured, {row['bubble_simulated']:.3f} simulated"
                )
            if options.json:
                options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
