"""Every collective and transfer over NCCL: triloom's group against torch's process group and cupy's binding.

What it moves, and the bandwidth formulas: as in comm.py. Buffers are on the GPU, each rank has one; a block ends when
the GPU has finished, so that a call's time is what it takes in a row of calls. With one rank NCCL only copies: its
figures are the floor of a call, and send is left out. Ranks that share a GPU (to test with; NCCL is told what it wants
to hear) go through the loopback network: their figures say nothing of links, and the output says so.

Host cost: microseconds the host spends to queue an all_reduce of 8 bytes, the GPU not waited for. "triloom" is
``group.all_reduce(x).wait()``, which checks the arguments, notes the operation, orders the streams and arms the
deadline; "binding" is csrc's NCCL call alone; "torch" is ``dist.all_reduce``; "cupy" its binding's call.

Run: ``python -m triloom_bench nccl``; or by hand ``mpirun -n 2 python -m triloom_bench.comm_nccl
[--ops all_reduce ...] [--most BYTES] [--rounds 9] [--json FILE] [--plot FILE.svg]``: files are rewritten with each row.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from triloom import boot
from triloom.boot import World
from triloom.groups.base import Group
from triloom.groups.nccl import DTYPE_CODES, REDUCE_CODES, load_nccl, version_text
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_streams import CudaStreams
from triloom.groups.nccl_world import nccl_group, sharing_settings
from triloom.groups.objects import gather_objects

from . import harness
from .comm import OPERATIONS, SUMS, Buffers, Call, echoes, line, repeat
from .comm_plot import plot
from .harness import Pair, Result
from .peers import cupy_nccl, gloo

OURS, TORCH, CUPY, BINDING = "triloom", "torch", "cupy", "binding"
SIZES = {8: 200, 16 << 10: 200, 1 << 20: 50, 8 << 20: 20, 64 << 20: 10, 256 << 20: 4}
"""Bytes -> calls in a block."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOST_CALLS = 200
"""Queued in a row: fewer than a GPU's queue holds."""

Side = Mapping[str, Callable[[Buffers], Call]]
"""By operation: makes a call that queues it."""


@dataclass(frozen=True)
class Bench:
    """Where and between whom. group: of the hosts, for barriers. finish: waits for the device."""

    group: Group
    device: torch.device
    finish: Callable[[], None]
    sides: Mapping[str, Side]
    bindings: Side = field(default_factory=dict)
    """For the host cost only."""
    notes: tuple[str, ...] = ()


def ours(group: Group) -> Side:
    return {name: partial(operation.ours, group) for name, operation in OPERATIONS.items()}


def binding(group: NCCLGroup) -> Side:
    """csrc's function, called with what it needs and nothing around it."""

    def all_reduce(b: Buffers) -> Call:
        nccl, handle, stream = group.comm.library, group.comm.handle, group.streams.address
        at, n, codes = b.whole.data_ptr(), b.whole.numel(), (DTYPE_CODES[b.whole.dtype], REDUCE_CODES["max"])
        return lambda: nccl.all_reduce(at, at, n, *codes, handle, stream)

    return {"all_reduce": all_reduce}


def peer() -> Side:
    """torch.distributed's default group."""
    return {name: operation.gloo for name, operation in OPERATIONS.items()}


def cupys(c: cupy_nccl.CupyNccl) -> Side:
    made: dict[str, Callable[[Buffers], Call]] = {name: partial(f, c) for name, f in cupy_nccl.CALLS.items()}
    return {**made, "send": lambda b: cupy_nccl.transfer(c, b, echo=echoes(b))}


def buffers(bench: Bench, dtype: str, nbytes: int) -> Buffers:
    size, item = bench.group.size, DTYPES[dtype].itemsize
    numel = max(size, nbytes // item // size * size)
    return Buffers(*(torch.ones(n, dtype=DTYPES[dtype], device=bench.device) for n in (numel, numel // size, numel)))


def measure(bench: Bench, name: str, dtype: str, nbytes: int, calls: int, rounds: int) -> Result:
    """One operation at one size, in every implementation."""
    b, ranks = buffers(bench, dtype, nbytes), bench.group.size
    size = b.whole.numel() * b.whole.element_size()

    def block(call: Call) -> Call:
        many = repeat(call, calls)

        def run() -> None:
            many()
            bench.finish()

        return run

    blocks = {who: block(side[name](b)) for who, side in bench.sides.items()}
    times = harness.interleave(bench.group, blocks, rounds=rounds, warmup=2)
    ways = 2 if name == "send" and echoes(b) else 1
    result = harness.summarise(
        f"{name}, {dtype}, {size} B, {ranks} ranks",
        "GB/s bus",
        OPERATIONS[name].factor(ranks) * size * calls * ways / 1e9,
        times,
        [Pair(OURS, (TORCH,)), Pair(OURS, (CUPY,))],
        setup={"operation": name, "dtype": dtype, "bytes": size, "calls": calls, "ways": ways, "ranks": ranks},
        notes=bench.notes,
    )
    result.setup["us_a_call"] = {who: c.median_s / calls / ways * 1e6 for who, c in result.contenders.items()}
    return result


def host_cost(bench: Bench, rounds: int, calls: int = HOST_CALLS) -> Result:
    """Host time to queue an all_reduce of 8 bytes, of the slowest rank."""
    b = buffers(bench, "fp32", 8)
    queues = {who: side["all_reduce"](b) for who, side in {**bench.sides, BINDING: bench.bindings}.items() if side}
    mine: dict[str, list[float]] = {who: [] for who in queues}
    for turn in range(-2, rounds):
        for who, queue in queues.items():
            bench.finish()
            bench.group.barrier().wait()
            begin = time.perf_counter()
            for _ in range(calls):
                queue()
            taken = time.perf_counter() - begin
            bench.finish()
            if turn >= 0:
                mine[who].append(taken)
    everyone = gather_objects(bench.group, mine)
    times = {who: [max(t) for t in zip(*(rank[who] for rank in everyone), strict=True)] for who in queues}
    result = harness.summarise(
        f"host cost of an all_reduce of 8 B, {bench.group.size} ranks", "calls/s", calls, times,
        [Pair(OURS, (TORCH,)), Pair(OURS, (CUPY,)), Pair(OURS, (BINDING,))],
        setup={"operation": "host cost", "calls": calls, "ranks": bench.group.size, "bytes": 8}, notes=bench.notes,
    )  # fmt: skip
    result.setup["us_a_call"] = {who: c.median_s / calls * 1e6 for who, c in result.contenders.items()}
    return result


def cases(ops: Sequence[str], most: int, ranks: int) -> Iterator[tuple[str, str, int]]:
    """The rows of a world of so many ranks, large sizes of bf16 sums among them."""
    sizes = [nbytes for nbytes in SIZES if nbytes <= most]
    for name in ops:
        if name == "send" and ranks < 2:
            continue
        yield from ((name, "fp32", nbytes) for nbytes in sizes)
        if name in SUMS:
            yield name, "bf16", sizes[-1]


def results(bench: Bench, ops: Sequence[str], most: int, rounds: int) -> Iterator[Result]:
    yield host_cost(bench, rounds)
    for name, dtype, nbytes in cases(ops, most, bench.group.size):
        yield measure(bench, name, dtype, nbytes, SIZES[nbytes], rounds)


def connect(world: World) -> tuple[Bench, Callable[[], None]]:
    """All implementations that there are, on this rank's GPU; and what ends them."""
    library = load_nccl()
    notes = [f"NCCL {version_text(library.version)}, {library.path}"]
    if torch.cuda.device_count() < world.local_size:
        os.environ.update(sharing_settings(library.version, world.rank))
        notes.append("ranks share a GPU: the figures say nothing of links")
    group = nccl_group(world.group, CudaStreams(world.device), library=library)
    group.warm()
    sides: dict[str, Side] = {OURS: ours(group)}
    ends: list[Callable[[], None]] = [group.close]
    if dist.is_nccl_available():
        gloo.start(world, "nccl", device_id=world.device)
        sides[TORCH] = peer()
        ends.append(gloo.stop)
    else:
        notes.append("this build of torch has no NCCL")
    try:
        theirs = cupy_nccl.start(world)
    except ImportError as error:
        notes.append(f"no cupy: {error}")
    else:
        sides[CUPY] = cupys(theirs)
        ends.append(theirs.close)

    def end() -> None:
        for close in reversed(ends):
            close()

    finish = partial(torch.cuda.synchronize, world.device)
    return Bench(world.group, world.device, finish, sides, binding(group), tuple(notes)), end


@dataclass
class Output:
    """Rows as they come: printed, and both files rewritten, so that a run that is cut off has left what it found."""

    json: Path | None
    plot: Path | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.rows.append(result.as_json())
        print(line(result), flush=True)
        self.write()

    def write(self) -> None:
        if self.json is not None:
            self.json.write_text(json.dumps(self.rows))
        if self.plot is not None:
            plot(self.rows, self.plot)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--most", type=int, default=max(SIZES), help="largest size in bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="an .svg or .png of bus bandwidth over size")
    options = parser.parse_args()
    with boot.init(threads=1) as world:
        output = Output(options.json, options.plot)
        if world.device.type != "cuda":
            if world.rank == 0:
                print("no GPU on this machine: nothing was measured over NCCL", flush=True)
                output.write()
            return
        bench, end = connect(world)
        for result in results(bench, options.ops, options.most, options.rounds):
            if world.rank == 0:
                output.add(result)
        end()


if __name__ == "__main__":
    main()
