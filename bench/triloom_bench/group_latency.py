"""Operations of the MPI group: latency with and without the fingerprint check, bandwidth, overlap.

What it moves: an all_reduce of n bytes over p ranks sends and receives 2 n (p-1)/p bytes per rank; the
time is set beside one memcpy of n bytes and MPI's own Allreduce (whose sums are in another order). Small
ones are a single exchange of header and data, so latency is what counts. *Overlap*: an all_reduce
is issued, the rank does something else for twice as long, then it is waited for; hidden = (transfer alone +
work alone - both together) / the shorter of the two. Nothing drives it but the progress thread. "idle" sleeps
(as a rank does whose work is on a GPU), "busy" multiplies matrices: a transfer between processes of one
host is itself work for the cores, so with a core per rank little of it can be hidden behind busy ones.

Set-up: the sides alternate within one run, every side is warmed first, rank 0 reports medians. The ranks
must have a core each, or the figures mean nothing.

Run: ``mpirun -n 2 python -m triloom_bench.group_latency [--calls 2000] [--rounds 9] [--megabytes 64]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from triloom import boot
from triloom.groups.base import Group
from triloom.groups.mpi import MPIGroup

SMALL_BYTES = (8, 1 << 10, 16 << 10, 64 << 10)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def medians(sides: Mapping[str, Callable[[], object]], rounds: int, calls: int, group: Group) -> dict[str, float]:
    """Median seconds of one call of each side; every round runs ``calls`` of each side in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for warm in (True, *[False] * rounds):
        for name, run in sides.items():
            group.barrier().wait()
            mine = [seconds(run) for _ in range(calls)]
            times[name] += [] if warm else mine
    return {name: statistics.median(mine) for name, mine in times.items()}


def ping_pong(group: Group, tensor: torch.Tensor) -> None:
    """There and back between ranks 0 and 1."""
    if group.rank < 2:
        for sending in (group.rank == 0, group.rank == 1):
            (group.send if sending else group.recv)(tensor, 1 - group.rank).wait()


def overlap(group: Group, tensor: torch.Tensor, rounds: int, busy: bool) -> dict[str, float]:
    """Median seconds of a transfer, of other work for twice as long, and of both together."""

    def transfer() -> None:
        group.all_reduce(tensor, "max").wait()

    span = torch.tensor([2 * medians({"t": transfer}, rounds, 1, group)["t"]], dtype=torch.float64)
    group.broadcast(span).wait()
    a = torch.randn(256, 256)
    repeats = max(1, round(span.item() / statistics.median(seconds(lambda: a @ a) for _ in range(50))))

    def work() -> None:
        if busy:
            for _ in range(repeats):
                torch.mm(a, a)
        else:
            time.sleep(span.item())

    def both() -> None:
        posted = group.all_reduce(tensor, "max")
        work()
        posted.wait()

    return medians({"transfer": transfer, "work": work, "both": both}, rounds, 3, group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=64)
    options = parser.parse_args()
    with boot.init(threads=1) as world:
        from mpi4py import MPI

        raw = MPI.COMM_WORLD.Dup()
        checked, unchecked = MPIGroup(raw), MPIGroup(raw, name="unchecked", check=False)
        report(world.rank == 0, options, raw, checked, unchecked)
        checked.close()
        unchecked.close()
        raw.Free()


def report(talks: bool, options: argparse.Namespace, raw: object, checked: Group, unchecked: Group) -> None:
    from mpi4py import MPI

    def all_reduces(x: torch.Tensor) -> dict[str, Callable[[], object]]:
        return {
            "checked": lambda: checked.all_reduce(x, "max").wait(),
            "unchecked": lambda: unchecked.all_reduce(x, "max").wait(),
            "MPI": lambda: raw.Allreduce(MPI.IN_PLACE, x, MPI.MAX),  # type: ignore[attr-defined]
        }

    def say(text: str) -> None:
        if talks:
            print(text, flush=True)

    say(f"{checked.size} ranks; median microseconds of an all_reduce")
    for nbytes in SMALL_BYTES:
        x = torch.ones(nbytes // 4)
        us = {k: v * 1e6 for k, v in medians(all_reduces(x), options.rounds, options.calls // 9 + 1, checked).items()}
        check = us["checked"] - us["unchecked"]
        say(f"{nbytes:7} B  " + "  ".join(f"{k} {v:6.1f}" for k, v in us.items()) + f"  check costs {check:5.2f}")
        pong = {"round trip": lambda x=x: ping_pong(checked, x)}
        trip = medians(pong, options.rounds, options.calls // 9 + 1, checked)["round trip"]
        say(f"           send and back {trip * 1e6:6.1f}")
    big = torch.ones(options.megabytes << 18)
    other = torch.empty_like(big)
    sides = {**all_reduces(big), "memcpy": lambda: other.copy_(big)}
    ms = {k: v * 1e3 for k, v in medians(sides, options.rounds, 1, checked).items()}
    say(f"{options.megabytes} MiB    " + "  ".join(f"{k} {v:.2f} ms ({v / ms['memcpy']:.1f}x)" for k, v in ms.items()))
    for megabytes, busy in ((1, False), (16, False), (1, True), (16, True)):
        t = overlap(checked, torch.ones(megabytes << 18), options.rounds, busy)
        hidden = (t["transfer"] + t["work"] - t["both"]) / min(t["transfer"], t["work"])
        say(
            f"overlap {megabytes} MiB, {'busy' if busy else 'idle'}: transfer {t['transfer'] * 1e3:.2f} ms, "
            f"work {t['work'] * 1e3:.2f} ms, both {t['both'] * 1e3:.2f} ms: {hidden:.0%} hidden"
        )


if __name__ == "__main__":
    main()
