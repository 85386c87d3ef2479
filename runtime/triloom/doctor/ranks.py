"""Looks that need several ranks: whether they are the same software, and how fast they talk. Collective."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from ..groups.base import Group
from ..groups.fingerprint import rank_list
from ..groups.objects import gather_objects
from ..topology import MEASURED_BYTES, measure
from .base import Place, Seen, mib
from .devices import nccl
from .host import mpi, software

CALLS = 200
SMALL = 2
"""Elements of a small message: 8 bytes."""


def agreement(place: Place) -> Seen:
    """Software of every rank against that of the others."""
    here: dict[str, Any] = dict(software(place).data)
    library = mpi(place).data
    here["MPI"] = f"{library['name']} {library.get('version', '')}".strip()
    here["NCCL"] = nccl(place).data["version"]
    group = place.world.group
    everyone = gather_objects(group, here)
    differ = differences(everyone, group.members)
    if differ:
        return Seen("; ".join(differ), {"differ": differ})
    return Seen(f"all {group.size} run the same {', '.join(here)}", {"differ": []})


def differences(everyone: list[dict[str, Any]], members: tuple[int, ...]) -> list[str]:
    """A sentence for each key on which ranks differ, naming ranks and values."""
    said = []
    for key in everyone[0]:
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            by_value.setdefault(str(one.get(key) or "none"), []).append(rank)
        if len(by_value) > 1:
            said.append(f"{key}: " + ", ".join(f"{value} on {rank_list(r, members)}" for value, r in by_value.items()))
    return said


def nodes(place: Place) -> Seen:
    found = place.world.topology
    order = "" if found.contiguous else "; neighbouring ranks are on different nodes"
    data = {"node": list(found.node), "names": list(found.names), "contiguous": found.contiguous}
    return Seen(f"{found}{order}", data)


def latency(place: Place) -> Seen:
    """A sum of 8 bytes over all ranks, median over calls that follow each other."""
    seconds = time_all_reduce(place.world.group, SMALL, CALLS)
    return Seen(f"all_reduce of {SMALL * 4} bytes: {seconds * 1e6:.1f} us", {"seconds": seconds})


def bandwidth(place: Place) -> Seen:
    """A sum of 16 MiB over all ranks, and a pair of ranks exchanging as much, inside a node and across."""
    group = place.world.group
    seconds = time_all_reduce(group, MEASURED_BYTES // 4, 5)
    pairs = measure(group, place.world.topology)
    rates = {"all_reduce": MEASURED_BYTES / seconds, "inside": pairs.inside, "outside": pairs.outside}
    words = {"all_reduce": "all_reduce", "inside": "a pair inside a node", "outside": "a pair across nodes"}
    shown = ", ".join(f"{words[name]} {rate / 1e9:.2g}" for name, rate in rates.items() if rate)
    return Seen(f"{mib(MEASURED_BYTES)} in GB/s: {shown}", rates)


def time_all_reduce(group: Group, numel: int, calls: int) -> float:
    """Median seconds of an all_reduce in fp32, waited for at once, after a few that are not counted."""
    x = torch.zeros(numel)
    taken = []
    for i in range(2 + calls):
        begin = time.perf_counter()
        group.all_reduce(x).wait()
        if i >= 2:
            taken.append(time.perf_counter() - begin)
    return median(taken)
