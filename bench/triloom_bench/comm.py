"""Every collective and transfer, from 8 B to 64 MiB: triloom's groups against raw mpi4py and gloo (NCCL: comm_nccl.py).

What it moves: S is the larger buffer of a rank in bytes (of an all_gather the output, of a reduce_scatter the
input, else the tensor), t the time of the slowest rank, p the ranks. The rate is bus bandwidth by the usual
formulas: all_reduce 2 (p-1)/p S/t; reduce_scatter, all_gather and all_to_all (p-1)/p S/t; broadcast and send S/t.
It is what the slowest link would carry in an ideal algorithm, and can be compared over p. From 1 MiB on, "copy" is
every rank copying S bytes at the same time, the unit in which the targets are stated: all_reduce at most 2.0 copies,
reduce_scatter at most 1.5.

Set-up: fp32 (and bf16 for sums, which MPI cannot do), maximum instead of sum so that values stay what they are,
contenders block by block in turn, so many calls a block that it takes milliseconds; buffers touched before. "shared
memory" is the default of ranks on one host, "messages" the same group over MPI's point-to-point, "unchecked" shared
memory without the comparison of fingerprints: what that costs is the difference; "adapter" is the group of an adopted
torch.distributed world, over gloo's point-to-point. send is there and back again for up to 1 MiB (half of it is
counted), else one way.

Run: ``python -m triloom_bench comm``, or by hand
``mpirun -n 2 python -m triloom_bench.comm [--ops all_reduce ...] [--rounds 9] [--json FILE] [--plot FILE.svg]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from triloom import boot
from triloom.boot import World
from triloom.groups.base import Group
from triloom.groups.mpi import MPIGroup

from . import harness
from .comm_plot import plot
from .harness import Pair, Result
from .peers import gloo

SIZES = {8: 200, 1 << 10: 200, 16 << 10: 100, 128 << 10: 40, 1 << 20: 8, 8 << 20: 1, 64 << 20: 1}
"""Bytes -> calls in a block. What goes over gloo runs a fifth of them."""
FEWER = 5
ECHO = 1 << 20
FINGERPRINT = 16 << 10
"""Up to here its cost is told; beyond, the difference is that of caches the block before has warmed."""
SHARED, PLAIN, MESSAGES, MPI_NAME, GLOO, COPY = "shared memory", "unchecked", "messages", "MPI", "gloo", "copy"
ADAPTER = "adapter"
BIGGEST = max(SIZES)

Call = Callable[[], object]


@dataclass(frozen=True)
class Buffers:
    """Of one size: ``whole`` has S bytes, ``part`` S/p, ``other`` is a second whole."""

    whole: torch.Tensor
    part: torch.Tensor
    other: torch.Tensor


@dataclass(frozen=True)
class Operation:
    """A row: bus factor, and how each side calls it. Raw sides take their library and this rank's number of peers."""

    factor: Callable[[int], float]
    ours: Callable[[Group, Buffers], Call]
    mpi: Callable[[Any, Buffers], Call]
    gloo: Callable[[Buffers], Call]
    targets: tuple[Pair, ...] = ()
    """At the largest size."""


def shares(p: int) -> float:
    return (p - 1) / p


def transfer(group: Group, b: Buffers) -> Call:
    def once() -> None:
        if group.rank < 2:
            (group.recv if group.rank else group.send)(b.whole, 1 - group.rank).wait()
            if echoes(b):
                (group.send if group.rank else group.recv)(b.whole, 1 - group.rank).wait()

    return once


def raw_transfer(send: Call, recv: Call, rank: int, b: Buffers) -> Call:
    def once() -> None:
        for first in (True, False)[: 1 + echoes(b)]:
            if rank < 2:
                (send if (rank == 0) == first else recv)()

    return once


def echoes(b: Buffers) -> bool:
    return b.whole.numel() * b.whole.element_size() <= ECHO


def mpi_transfer(comm: Any, b: Buffers) -> Call:
    peer = 1 - comm.rank
    return raw_transfer(lambda: comm.Send(b.whole, peer), lambda: comm.Recv(b.whole, peer), comm.rank, b)


def gloo_transfer(b: Buffers) -> Call:
    rank = dist.get_rank()
    return raw_transfer(lambda: dist.send(b.whole, 1 - rank), lambda: dist.recv(b.whole, 1 - rank), rank, b)


def mpi_all_reduce(comm: Any, b: Buffers) -> Call:
    from mpi4py import MPI

    return lambda: comm.Allreduce(MPI.IN_PLACE, b.whole, MPI.MAX)


def mpi_reduce_scatter(comm: Any, b: Buffers) -> Call:
    from mpi4py import MPI

    return lambda: comm.Reduce_scatter_block(b.whole, b.part, MPI.MAX)


MAX = dist.ReduceOp.MAX
NO_SLOWER = Pair(SHARED, (MPI_NAME,), 1.0)
OPERATIONS: dict[str, Operation] = {
    "all_reduce": Operation(
        lambda p: 2 * (p - 1) / p,
        lambda g, b: lambda: g.all_reduce(b.whole, "max").wait(),
        mpi_all_reduce,
        lambda b: lambda: dist.all_reduce(b.whole, MAX),
        (Pair(SHARED, (COPY,), 1 / 2.0),),
    ),
    "reduce_scatter": Operation(
        shares,
        lambda g, b: lambda: g.reduce_scatter(b.part, b.whole, "max").wait(),
        mpi_reduce_scatter,
        lambda b: lambda: dist.reduce_scatter_tensor(b.part, b.whole, MAX),
        (Pair(SHARED, (COPY,), 1 / 1.5),),
    ),
    "all_gather": Operation(
        shares,
        lambda g, b: lambda: g.all_gather(b.whole, b.part).wait(),
        lambda comm, b: lambda: comm.Allgather(b.part, b.whole),
        lambda b: lambda: dist.all_gather_into_tensor(b.whole, b.part),
    ),
    "broadcast": Operation(
        lambda p: 1.0,
        lambda g, b: lambda: g.broadcast(b.whole).wait(),
        lambda comm, b: lambda: comm.Bcast(b.whole),
        lambda b: lambda: dist.broadcast(b.whole, 0),
    ),
    "all_to_all": Operation(
        shares,
        lambda g, b: lambda: g.all_to_all(b.other, b.whole).wait(),
        lambda comm, b: lambda: comm.Alltoall(b.whole, b.other),
        lambda b: lambda: dist.all_to_all_single(b.other, b.whole),
    ),
    "send": Operation(lambda p: 1.0, transfer, mpi_transfer, gloo_transfer),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SUMS = ("all_reduce", "reduce_scatter")


@dataclass(frozen=True)
class Sides:
    """Everyone who communicates."""

    groups: dict[str, Group]
    comm: Any


def repeat(call: Call, calls: int) -> Call:
    def block() -> None:
        for _ in range(calls):
            call()

    return block


def measure(name: str, dtype: str, nbytes: int, sides: Sides, world: World, rounds: int) -> Result:
    """One operation at one size, in every implementation."""
    operation, calls = OPERATIONS[name], SIZES[nbytes]
    numel = max(world.size, nbytes // DTYPES[dtype].itemsize // world.size * world.size)
    buffers = Buffers(*(torch.ones(n, dtype=DTYPES[dtype]) for n in (numel, numel // world.size, numel)))
    size = numel * DTYPES[dtype].itemsize
    sought = {who: operation.ours(group, buffers) for who, group in sides.groups.items()}
    if dtype == "fp32":
        sought |= {MPI_NAME: operation.mpi(sides.comm, buffers), GLOO: operation.gloo(buffers)}
    if nbytes >= 1 << 20:
        sought[COPY] = lambda: buffers.other.copy_(buffers.whole)
    counts = {who: max(1, calls // FEWER) if who in (GLOO, ADAPTER) else calls for who in sought}
    blocks = {who: repeat(call, counts[who]) for who, call in sought.items()}
    times = harness.interleave(world.group, blocks, rounds=rounds)
    times = {who: [t * calls / counts[who] for t in some] for who, some in times.items()}
    ways = 2 if name == "send" and size <= ECHO else 1
    result = harness.summarise(
        f"{name}, {dtype}, {size} B, {world.size} ranks",
        "GB/s bus",
        operation.factor(world.size) * size * calls * ways / 1e9,
        times,
        pairs(operation, nbytes),
        setup={
            "operation": name, "dtype": dtype, "bytes": size, "calls": calls, "ways": ways, "ranks": world.size,
            "transport": {who: getattr(group, "transport", "") for who, group in sides.groups.items()},
        },
    )  # fmt: skip
    us = {who: c.median_s / calls / ways * 1e6 for who, c in result.contenders.items()}
    result.setup["us_a_call"] = us
    if nbytes <= FINGERPRINT:
        result.setup["fingerprint_us"] = us[SHARED] - us[PLAIN]
    return result


def pairs(operation: Operation, nbytes: int) -> tuple[Pair, ...]:
    """MPI's no-slower target holds at the largest size; at others the ratios are information."""
    if nbytes == BIGGEST:
        return (*operation.targets, NO_SLOWER, Pair(SHARED, (GLOO,)))
    return (
        Pair(SHARED, (MPI_NAME,)), Pair(SHARED, (GLOO,)), Pair(SHARED, (MESSAGES,)), Pair(ADAPTER, (GLOO,)),
    )  # fmt: skip


def line(result: Result) -> str:
    """A row of the printed table: microseconds of a call by contender."""
    cells = [f"{who} {us:10.1f}" for who, us in result.setup["us_a_call"].items()]
    return f"{result.title:44} us/call: " + "  ".join(cells)


def cases(ops: list[str], most: int) -> Iterator[tuple[str, str, int]]:
    for name in ops:
        for nbytes in SIZES:
            if nbytes <= most:
                yield name, "fp32", nbytes
        if name in SUMS:
            yield name, "bf16", min(most, BIGGEST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--most", type=int, choices=SIZES, default=BIGGEST, help="largest size in bytes")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the results, beside the table on standard output")
    parser.add_argument("--plot", type=Path, help="an .svg or .png of bus bandwidth over size")
    options = parser.parse_args()
    with boot.init(threads=1) as world:
        from mpi4py import MPI

        gloo.start(world)
        comm = MPI.COMM_WORLD.Dup()
        adapter = boot.adopt(dist, threads=1, shared_memory=False)
        groups: dict[str, Group] = {
            SHARED: MPIGroup(comm, name=SHARED),
            PLAIN: MPIGroup(comm, name=PLAIN, check=False),
            MESSAGES: MPIGroup(comm, name=MESSAGES, shared=None),
            ADAPTER: adapter.group,
        }
        sides, rows = Sides(groups, comm), []
        for name, dtype, nbytes in cases(options.ops, options.most):
            result = measure(name, dtype, nbytes, sides, world, options.rounds)
            rows.append(result.as_json())
            if world.rank == 0:
                print(line(result), flush=True)
        if options.json and world.rank == 0:
            options.json.write_text(json.dumps(rows))
        if options.plot and world.rank == 0:
            plot(rows, options.plot)
        for group in groups.values():
            group.close()
        comm.Free()
        gloo.stop()


if __name__ == "__main__":
    main()
