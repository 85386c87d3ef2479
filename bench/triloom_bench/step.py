"""A training step against peers: tokens/s of triloom over tokens/s of the peer.

What it moves: a GPT-2 shape with P parameters takes about 6 P FLOP a token, plus attention. dp moves 2 P
elements a step over the group (reduce_scatter and all_gather, or all_reduce), tp 4 activations a block
and step (all_reduce), pp one activation and one gradient per boundary and microbatch. The rate is
tokens/s = batch * sequence * steps / seconds of the slowest rank.

Set-up: fp32, AdamW (decay on matrices only) and clipping at norm 1, no dropout, the same initial weights
and batches on all sides, everyone in the same processes, block by block in turn. small: 4 layers, 4
heads, 128 wide, block 64, batch 12 (16 for the pipeline), vocabulary 65, nanoGPT's CPU size; large: 8
layers, 8 heads, 512 wide, sequence 256, batch 8, vocabulary 256. Before anything is timed, the losses of
the first steps must agree, or the bench refuses to report. The two ends of a tp peer may be replicated or
split over the vocabulary; the faster form counts.

Run: ``python -m triloom_bench one dp tp pp schedules zero memory`` (starts mpirun itself), or one launch by hand:
``mpirun -n 2 python -m triloom_bench.step dp --size small large [--rounds 9] [--json FILE]``. With
``--alone CONTENDER`` one side runs by itself and the peak memory of each rank is reported instead.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from triloom import boot
from triloom.boot import World
from triloom.engine import Engine
from triloom.groups.objects import gather_objects
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2
from triloom.optim import AdamW
from triloom.parallel.executor import Recorder
from triloom.placement import NAMED
from triloom.shards import split_even

from . import harness
from .harness import Pair, Result
from .peers import gloo
from .work import (
    BETAS,
    CLIP,
    DECAY,
    EPS,
    LR,
    MICROBATCHES,
    SIZES,
    Absent,
    Build,
    Setting,
    Size,
    State,
    Step,
    make_batches,
)

CHECKED_STEPS = 4
RTOL = 1e-4
"""Of the losses of the first steps: fp32 summed in other orders, for a few steps."""


@dataclass(frozen=True, kw_only=True)
class Ours:
    """Options of the engine in one case."""

    pp: int = 1
    tp: int = 1
    placement: str = "zero1"
    microbatches: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    chunks: int = 1
    """Stages a rank under this schedule."""


@dataclass(frozen=True)
class Case:
    """Who runs, and what is compared with what, by size."""

    ours: Mapping[str, Ours]
    peers: Mapping[str, str]
    """Name -> ``module:builder`` in triloom_bench.peers."""
    pairs: Mapping[str, tuple[Pair, ...]]
    pipeline: bool = False


def pairs(ours: str, peers: tuple[str, ...], small: float | None, large: float | None) -> dict[str, tuple[Pair, ...]]:
    return {"small": (Pair(ours, peers, small),), "large": (Pair(ours, peers, large),)}


def both(*some: dict[str, tuple[Pair, ...]]) -> dict[str, tuple[Pair, ...]]:
    return {size: tuple(p for one in some for p in one[size]) for size in SIZES}


OURS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2, "auto": 1}
"""Schedules of ours, and how many stages a rank has under each."""
THEIRS = {
    "GPipe": "gpipe", "1F1B": "one_f_one_b", "interleaved": "interleaved", "zero bubble": "zero_bubble", "ZBV": "zbv",
}  # fmt: skip
TP_PEERS = ("torch tp", "torch tp, vocab-parallel")
CASES: dict[str, Case] = {
    "one": Case({"triloom": Ours()}, {"torch": "plain:build"}, pairs("triloom", ("torch",), 0.97, 0.97)),
    "dp": Case(
        {"triloom zero0": Ours(placement="zero0"), "triloom zero1": Ours()},
        {"torch DDP": "ddp:build"},
        both(pairs("triloom zero0", ("torch DDP",), 1.15, 1.12), pairs("triloom zero1", ("torch DDP",), 1.15, 1.12)),
    ),
    "tp": Case(
        {"triloom tp": Ours(tp=2), "triloom tp, sequence": Ours(tp=2, sequence=True)},
        {TP_PEERS[0]: "tensor:replicated", TP_PEERS[1]: "tensor:vocab_parallel"},
        both(pairs("triloom tp", TP_PEERS, 2.0, 1.25), pairs("triloom tp, sequence", TP_PEERS, None, None)),
    ),
    "pp": Case(
        {"triloom 1f1b": Ours(pp=2, microbatches=MICROBATCHES)},
        {"torch 1F1B": "pipeline:one_f_one_b"},
        pairs("triloom 1f1b", ("torch 1F1B",), 1.25, 1.12),
        pipeline=True,
    ),
    "schedules": Case(
        {f"triloom {name}": Ours(pp=2, microbatches=MICROBATCHES, schedule=name, chunks=n) for name, n in OURS.items()},
        {f"torch {name}": f"pipeline:{path}" for name, path in THEIRS.items()},
        both(
            pairs("triloom gpipe", ("torch GPipe",), 1.0, 1.0),
            pairs("triloom 1f1b", ("torch 1F1B",), 1.0, 1.0),
            pairs("triloom interleaved", ("torch interleaved",), 1.0, 1.0),
            pairs("triloom zb_v", ("torch ZBV",), 1.0, 1.0),
            pairs("triloom auto", tuple(f"torch {name}" for name in THEIRS), 1.0, 1.0),
            pairs("triloom zb_h1", ("triloom 1f1b",), None, None),
            pairs("triloom auto", ("triloom 1f1b",), None, None),
        ),
        pipeline=True,
    ),
    "zero": Case(
        {f"triloom zero{stage}": Ours(placement=f"zero{stage}") for stage in (1, 2, 3)},
        {**{f"DeepSpeed ZeRO-{n}": f"deepspeed_zero:stage{n}" for n in (1, 2, 3)}, "torch FSDP2": "fsdp2:build"},
        both(
            pairs("triloom zero1", ("DeepSpeed ZeRO-1",), 1.4, 1.0),
            pairs("triloom zero2", ("DeepSpeed ZeRO-2",), 1.4, 1.0),
            pairs("triloom zero3", ("DeepSpeed ZeRO-3",), 2.5, 1.0),
            pairs("triloom zero3", ("torch FSDP2",), 2.0, 1.0),
        ),
    ),
}


def engine_of(size: Size, world: World, ours: Ours, record: Recorder | None = None) -> Engine:
    model = decoder(gpt2(vocab=size.vocab, hidden=size.hidden, layers=size.layers, heads=size.heads, max_seq=size.seq))
    return Engine(
        model.units,
        model.loss,
        ties=model.ties,
        world=world.group,
        mesh=make_mesh(world.size, pp=ours.pp, tp=ours.tp),
        schedule=ours.schedule,
        stages=stage_sizes(size, ours.pp * ours.chunks),
        microbatches=ours.microbatches,
        placement=NAMED[ours.placement](),
        sequence_parallel=ours.sequence,
        optimizer=AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY),
        clip=CLIP,
        record=record,
    )


def stage_sizes(size: Size, stages: int) -> list[int]:
    """Blocks dealt evenly, the embedding to the first and the head to the last: as the peer's."""
    sizes = [b - a for a, b in split_even(size.layers, stages)]
    sizes[0] += 1
    sizes[-1] += 1
    return sizes


def step_of(engine: Engine, setting: Setting) -> Step:
    dp = engine.groups.axis("dp")
    return lambda i: engine.step(*setting.batch(i, dp.size, dp.rank)).loss


def shares_of(engines: Mapping[str, Engine], setting: Setting, steps: int) -> dict[str, dict[str, float]]:
    """Of each engine's steps, the part that its slowest rank waited for others or updated parameters in, in percent."""
    out = {}
    for name, engine in engines.items():
        step, mine = step_of(engine, setting), dict[str, float]()
        begin = time.perf_counter()
        for i in range(steps):
            step(i)
            for kind, seconds in engine.state.spent.seconds().items():
                mine[kind] = mine.get(kind, 0.0) + seconds
        whole = time.perf_counter() - begin
        everyone = gather_objects(setting.world.group, {kind: 100 * s / whole for kind, s in mine.items()})
        out[name] = {kind: round(max(one[kind] for one in everyone), 1) for kind in mine}
    return out


def peer_builder(path: str) -> Build:
    """Imported late: one contender measured alone must not carry the others' libraries."""
    module, name = path.split(":")
    build: Build = getattr(importlib.import_module(f".peers.{module}", __package__), name)
    return build


def contenders(case: Case, size: Size, world: World) -> tuple[dict[str, Step], dict[str, Engine], list[str]]:
    """Everyone who can run, with equal weights; our engines; notes on who cannot."""
    batch = size.pipeline_batch if case.pipeline else size.batch
    batches = make_batches(size, batch)
    steps: dict[str, Step] = {}
    engines: dict[str, Engine] = {}
    weights: State | None = None
    for name, ours in case.ours.items():
        engines[name] = engine = engine_of(size, world, ours)
        weights = engine.full_state() if weights is None else weights
        steps[name] = step_of(engine, Setting(size, world, batches, None))
    notes = []
    for name, path in case.peers.items():
        try:
            steps[name] = peer_builder(path)(Setting(size, world, batches, weights))
        except Absent as absent:
            notes.append(f"{name} absent: {absent}")
    return steps, engines, notes


def run_case(name: str, size: Size, world: World, rounds: int) -> Result:
    case = CASES[name]
    steps, engines, notes = contenders(case, size, world)
    losses = {who: [step(i) for i in range(CHECKED_STEPS)] for who, step in steps.items()}
    means = harness.same_losses(world.group, losses, rtol=RTOL)
    sides = {who: blocks(step, size.steps) for who, step in steps.items()}
    times = harness.interleave(world.group, sides, rounds=rounds * size.repeat)
    batch = size.pipeline_batch if case.pipeline else size.batch
    shares = shares_of(engines, Setting(size, world, make_batches(size, batch), None), size.steps * size.repeat)
    for who, part in shares.items():
        exposed, update = part["exposed"], part["optimizer"]
        notes.append(f"{who}: {exposed}% of a step is exposed communication, {update}% the optimizer")
    return harness.summarise(
        f"{name}, {size.name}, {world.size} ranks x {world.threads} threads",
        "tokens/s",
        batch * size.seq * size.steps,
        times,
        case.pairs[size.name],
        setup={
            "case": name, "size": vars(size), "ranks": world.size, "threads": world.threads, "global_batch": batch,
            "microbatches": MICROBATCHES if case.pipeline else 1, "dtype": "float32", "first_losses": means,
            "percent_of_step": shares,
        },
        notes=notes,
    )  # fmt: skip


def blocks(step: Step, count: int) -> harness.Block:
    """A block of ``count`` steps, going on through the batches."""
    done = CHECKED_STEPS

    def block() -> None:
        nonlocal done
        for i in range(done, done + count):
            step(i)
        done += count

    return block


def peak_memory(name: str, who: str, size: Size, world: World) -> dict[str, object]:
    """Peak resident MiB of every rank, after a few steps of one contender in processes of its own."""
    case = CASES[name]
    setting = Setting(size, world, make_batches(size, size.pipeline_batch if case.pipeline else size.batch), None)
    start = _status_mib("VmHWM")
    try:
        if who in case.ours:
            step = step_of(engine_of(size, world, case.ours[who]), setting)
        else:
            step = peer_builder(case.peers[who])(setting)
    except Absent as absent:
        return {"case": name, "contender": who, "size": size.name, "absent": str(absent)}
    for i in range(CHECKED_STEPS):
        step(i)
    rows = gather_objects(world.group, [start, _status_mib("VmHWM")])
    return {
        "case": name, "contender": who, "size": size.name, "ranks": world.size, "threads": world.threads,
        "before_mib": [r[0] for r in rows], "peak_mib": [r[1] for r in rows],
    }  # fmt: skip


def _status_mib(field: str) -> int:
    """A field of the kernel's account of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--alone", metavar="CONTENDER", help="measure the peak memory of this contender instead")
    parser.add_argument("--json", type=Path, help="file for the results, beside the table on standard output")
    options = parser.parse_args()
    with boot.init(threads=options.threads) as world:
        rows = []
        for size in options.size:
            if options.alone:
                rows.append(peak_memory(options.case, options.alone, SIZES[size], world))
            else:
                rows.append(run_case(options.case, SIZES[size], world, options.rounds).as_json())
            if world.rank == 0:
                print(json.dumps(rows[-1]) if options.alone else harness.table(rows[-1]), flush=True)
        if options.json and world.rank == 0:
            options.json.write_text(json.dumps(rows))
        gloo.stop()


if __name__ == "__main__":
    main()
