"""Which ranks share a node, how their GPUs are linked, and what that means for a mesh. Read once, by ``boot.init``.

The default order of the mesh, (dp, pp, tp), makes neighbouring ranks a tensor-parallel group. Started node by node,
as launchers do by default, ranks of one node are neighbours, so tp stays inside a node wherever it fits.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from .errors import ConfigError
from .gpu_links import Link, speed, words
from .groups.base import Group, Transfer
from .groups.objects import broadcast_object
from .mesh import DEFAULT_ORDER, Mesh

MEASURED_BYTES = 16 << 20


@dataclass(frozen=True)
class Topology:
    """Nodes of a job: groups of ranks that share memory.

    node: node of each rank, numbered in the order of their lowest ranks. names: host name of each node. links: of the
    ranks' GPUs inside the nodes, as far as they are known.
    """

    node: tuple[int, ...]
    names: tuple[str, ...]
    links: tuple[Link, ...] = ()

    def local(self, rank: int) -> tuple[int, ...]:
        """The ranks of this rank's node, itself included."""
        return tuple(r for r, node in enumerate(self.node) if node == self.node[rank])

    @property
    def sizes(self) -> tuple[int, ...]:
        """Ranks of each node."""
        return tuple(self.node.count(i) for i in range(len(self.names)))

    @property
    def contiguous(self) -> bool:
        """Whether the ranks of every node are neighbours."""
        return list(self.node) == sorted(self.node)

    def __str__(self) -> str:
        return ", ".join(f"{name} ({n} rank{'s' * (n > 1)})" for name, n in zip(self.names, self.sizes, strict=True))


def make_topology(keys: Sequence[str], names: Sequence[str] | None = None) -> Topology:
    """The topology of ranks by what identifies their nodes; ``names``: the host name of each rank."""
    order = list(dict.fromkeys(keys))
    shown = names or keys
    return Topology(tuple(order.index(key) for key in keys), tuple(shown[keys.index(key)] for key in order))


def forced_topology(hosts: Sequence[str], size: int) -> Topology:
    """The topology of a given host for every rank. Raises ConfigError if their number is wrong."""
    if isinstance(hosts, str) or len(hosts) != size or not all(isinstance(host, str) and host for host in hosts):
        raise ConfigError(f"hosts must name a host for each of the {size} ranks, got {hosts!r}")
    return make_topology(hosts)


def node_key() -> str:
    """What processes have in common exactly if they can share memory: host, its boot, its /dev/shm.

    Host names alone repeat (containers), and containers of one host need not see the same /dev/shm.
    """
    boot = shm = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        shm = str(os.stat("/dev/shm").st_dev)
    return f"{socket.gethostname()}|{boot}|{shm}"


# ---------------------------------------------------------------- what it means for a mesh


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second between two ranks, each sending to the other at once; None where there is no such pair."""

    inside: float | None
    outside: float | None


def crossing(mesh: Mesh, topology: Topology, axis: str = "tp") -> tuple[tuple[int, ...], ...]:
    """The groups along an axis whose ranks are on several nodes."""
    return tuple(group for group in mesh.partition(axis) if len({topology.node[r] for r in group}) > 1)


def placement_note(mesh: Mesh, topology: Topology) -> str:
    """One line: where the tp groups are. For a mesh without crossing tp groups."""
    tp = mesh.axis("tp")
    slowest = max((link.kind for link in links_of(mesh, topology)), key=speed, default="")
    over = f" over {words(slowest)}" if slowest and tp > 1 else ""
    if len(topology.names) == 1:
        return f"one node: {topology}" + (f"; every tp group of {tp} ranks{over}" if over else "")
    where = f"every tp group of {tp} ranks is inside a node{over}" if tp > 1 else "tp is 1, nothing of it crosses nodes"
    order = " (default order)" if mesh.names == DEFAULT_ORDER else ""
    return f"{len(topology.names)} nodes: {topology}; {where}, order {', '.join(mesh.names)}{order}"


def links_of(mesh: Mesh, topology: Topology, axis: str = "tp") -> list[Link]:
    """The links between GPUs of one group along an axis."""
    group_of = {r: i for i, group in enumerate(mesh.partition(axis)) for r in group}
    return [link for link in topology.links if group_of[link.a] == group_of[link.b]]


def slow_links(mesh: Mesh, topology: Topology) -> str | None:
    """What is wrong where a tp group has a slower link than some other pair of its node, and the way out."""
    best: dict[int, str] = {}
    for link in sorted(topology.links, key=lambda link: speed(link.kind)):
        best.setdefault(topology.node[link.a], link.kind)
    slow = [x for x in links_of(mesh, topology) if speed(x.kind) > max(speed("NV"), speed(best[topology.node[x.a]]))]
    if not slow:
        return None
    worst = max(slow, key=lambda link: speed(link.kind))
    node = topology.node[worst.a]
    return (
        f"tp={mesh.axis('tp')} goes over {words(worst.kind)} between ranks {worst.a} and {worst.b} of "
        f"{topology.names[node]}, where other pairs have {words(best[node])}; each layer waits for that link several "
        "times. Name GPUs that are linked next to each other in CUDA_VISIBLE_DEVICES (`triloom doctor` shows the "
        "links), or use a smaller parallel.tp"
    )


def placement_warning(mesh: Mesh, topology: Topology, measured: Bandwidths | None = None) -> str | None:
    """What is wrong with a mesh whose tp groups cross nodes, and the way out; None if none does."""
    groups = crossing(mesh, topology)
    if not groups:
        return None
    first = groups[0]
    sides = " and ".join(
        f"{topology.names[node]}: {', '.join(str(r) for r in first if topology.node[r] == node)}"
        for node in sorted({topology.node[r] for r in first})
    )
    speed = ""
    if measured is not None and measured.outside:
        inside = f"{measured.inside / 1e9:.2g} GB/s inside a node, " if measured.inside else ""
        speed = f" Measured between two ranks: {inside}{measured.outside / 1e9:.2g} GB/s across."
    return (
        f"tp={mesh.axis('tp')} crosses nodes in {len(groups)} of {len(mesh.partition('tp'))} groups, the first has "
        f"ranks {sides}; each layer waits for that link several times.{speed} {_way_out(mesh, topology)}"
    )


def _way_out(mesh: Mesh, topology: Topology) -> str:
    tp, smallest = mesh.axis("tp"), min(topology.sizes)
    fits = [t for t in range(1, tp + 1) if tp % t == 0 and all(size % t == 0 for size in topology.sizes)]
    if fits[-1] < tp:
        return f"A node has {smallest} ranks: use parallel.tp {fits[-1]}, or start a multiple of {tp} ranks a node"
    if not topology.contiguous:
        return "Neighbouring ranks are on different nodes: start them node by node (mpirun --map-by slot)"
    return f"The order {', '.join(mesh.names)} spreads tp: use parallel.order {', '.join(DEFAULT_ORDER)}"


# ---------------------------------------------------------------- measured


def measure(group: Group, topology: Topology) -> Bandwidths:
    """Bandwidth of one pair of ranks inside a node and of one across; collective over ``group``."""
    ranks = range(group.size)
    pairs = [(a, b) for a in ranks for b in ranks if a < b]
    inside = next(((a, b) for a, b in pairs if topology.node[a] == topology.node[b]), None)
    outside = next(((a, b) for a, b in pairs if topology.node[a] != topology.node[b]), None)
    return Bandwidths(*(None if pair is None else pair_bandwidth(group, *pair) for pair in (inside, outside)))


def describe_placement(group: Group, mesh: Mesh, topology: Topology) -> str | None:
    """What to say of the mesh's place on nodes and GPUs, None if nothing. Collective over ``group``: it may measure."""
    if crossing(mesh, topology):
        return f"warning: {placement_warning(mesh, topology, measure(group, topology))}"
    slow = slow_links(mesh, topology)
    if slow is not None:
        return f"warning: {slow}"
    worth_a_word = len(topology.names) > 1 or (mesh.axis("tp") > 1 and topology.links)
    return placement_note(mesh, topology) if worth_a_word else None


def pair_bandwidth(group: Group, a: int, b: int, *, nbytes: int = MEASURED_BYTES, repeats: int = 5) -> float:
    """Bytes per second that ranks ``a`` and ``b`` send to each other at once, the median of ``repeats``; collective."""
    seconds = 0.0
    if group.rank in (a, b):
        peer = b if group.rank == a else a
        sent, got = torch.ones(nbytes // 4), torch.ones(nbytes // 4)  # ones: fresh memory is touched before timing
        taken = []
        for _ in range(1 + repeats):
            begin = time.perf_counter()
            group.batch([Transfer("send", sent, peer), Transfer("recv", got, peer)]).wait()
            taken.append(time.perf_counter() - begin)
        seconds = median(taken[1:])
    return nbytes / float(broadcast_object(group, seconds, a))
