"""``python -m triloom_bench [NAME ...] [--rounds N] [--out FOLDER]``: run benches, print tables, write JSON.

Without names: every bench. Exit status 1 if a launch failed; a missed target is a figure, not a failure.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .harness import MIN_ROUNDS
from .launch import Bench, Launch, run
from .step import CASES


def step(case: str, *args: str, ranks: int = 2) -> Launch:
    return Launch(ranks, "step", (case, *args))


def memory() -> tuple[Launch, ...]:
    """Every contender of the large size in processes of its own."""
    return tuple(
        step(name, "--size", "large", "--alone", who, ranks=1 if name == "one" else 2)
        for name, case in CASES.items()
        for who in (*case.ours, *case.peers)
    )


BENCHES: dict[str, Bench] = {
    "one": Bench(
        "a step on one rank against a plain PyTorch loop",
        (step("one", "--threads", "1", ranks=1), step("one", "--threads", "2", ranks=1)),
    ),
    "dp": Bench("dp=2, placements zero0 and zero1, against torch DDP", (step("dp"),)),
    "tp": Bench("tp=2 against torch.distributed.tensor", (step("tp"),)),
    "pp": Bench("pp=2, 1F1B with 8 microbatches, against torch.distributed.pipelining", (step("pp"),)),
    "schedules": Bench(
        "pp=2, six schedules with 8 microbatches, against those of torch.distributed.pipelining", (step("schedules"),)
    ),
    "makespan": Bench("measured steps of a pipeline over simulated ones", (Launch(2, "makespan"),)),
    "search": Bench(
        "the simulator's speed, and automatic schedules against their bound",
        (Launch(1, "schedules", structured=False, rounds=False),),
    ),
    "zero": Bench("ZeRO stages 1 to 3 on dp=2 against DeepSpeed and torch FSDP2", (step("zero"),)),
    "memory": Bench("peak memory of every rank, each contender alone", memory()),
    "adamw": Bench("the optimizer's update against torch's fused AdamW", (Launch(1, "adamw", structured=False),)),
    "comm": Bench("every collective and transfer, 8 B to 64 MiB, against MPI and gloo", (Launch(2, "comm"),)),
    "checkpoint": Bench(
        "saving and loading against the disk's limit, safetensors, torch.save and DCP; stall of an asynchronous save",
        (Launch(1, "checkpoint"),),
    ),
    "data": Bench("cutting batches from every kind of source, and what it costs a step", (Launch(1, "data"),)),
    "nanogpt": Bench(
        "validation loss at nanoGPT's CPU settings against a plain PyTorch loop: a loss, not a time",
        (Launch(2, "nanogpt", rounds=False),),
    ),
    "nccl": Bench("every collective over NCCL against torch's and cupy's; host cost", (Launch(0, "comm_nccl"),)),
    "kernels": Bench(
        "every kernel against torch, torch.compile and others; without a GPU the eager references alone",
        (Launch(1, "kernels"),),
    ),
    "gpu_step": Bench(
        "bf16 steps of Llama shapes on one GPU against PyTorch with torch.compile: tokens/s, MFU, peak memory",
        (Launch(1, "gpu_step"),),
    ),
    "executor": Bench(
        "what the executor adds to the torch calls of an action, units that do nothing", (Launch(1, "executor"),)
    ),
    "group_latency": Bench(
        "operations of the MPI group: latency, bandwidth, overlap", (Launch(2, "group_latency", structured=False),)
    ),
}


def main() -> int:
    names = "\n".join(f"  {name:14} {bench.about}" for name, bench in BENCHES.items())
    parser = argparse.ArgumentParser(
        prog="triloom_bench", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"benches:\n{names}"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benches to run, all if left out")
    parser.add_argument("--rounds", type=int, default=9, help=f"blocks of each contender, at least {MIN_ROUNDS}")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder of the JSON files")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a launch may take")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHES]
    if unknown:
        parser.error(f"unknown bench {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {options.rounds}: a median needs at least {MIN_ROUNDS}")
    fine = [
        run(name, BENCHES[name], rounds=options.rounds, out=options.out, timeout=options.timeout)
        for name in options.names or BENCHES
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
