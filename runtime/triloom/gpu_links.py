"""How the GPUs of a host reach each other, as ``nvidia-smi topo -m`` says; read once, by ``boot.init``."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .groups.base import Group
from .groups.objects import gather_objects

KINDS = {
    "SAME": "one GPU for both",
    "NV": "NVLink",
    "PIX": "one PCIe switch",
    "PXB": "several PCIe switches",
    "PHB": "a PCIe host bridge",
    "NODE": "PCIe within a NUMA node",
    "SYS": "PCIe across NUMA nodes",
}
"""nvidia-smi's words for a link (SAME is ours), fastest first. NV comes with the number of links: NV18."""

SECONDS = 10
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_LISTED = re.compile(r"^GPU (\d+): .*\(UUID: (?:GPU-)?([^)]+)\)", re.MULTILINE)


class Link(NamedTuple):
    """Between the GPUs of two ranks of one node, ``a < b``."""

    a: int
    b: int
    kind: str


def speed(kind: str) -> int:
    """Place in KINDS, 0 is the fastest; unknown kinds come last."""
    name = kind.rstrip("0123456789")
    return list(KINDS).index(name) if name in KINDS else len(KINDS)


def words(kind: str) -> str:
    """``NV18 (NVLink)``"""
    name = KINDS.get(kind.rstrip("0123456789"), "")
    return f"{kind} ({name})" if name else kind


def read_links(topo: str) -> dict[tuple[int, int], str]:
    """Kind of link of every pair of GPUs ``(lower, higher)``, from the text of ``nvidia-smi topo -m``."""
    rows = [line.split() for line in _STYLE.sub("", topo).splitlines()]
    matrix = [row for row in rows if row and row[0].startswith("GPU") and row[0][3:].isdigit()]
    columns = {int(row[0][3:]): row[1:] for row in matrix if "X" in row}
    order = sorted(columns)
    return {(a, b): columns[a][i] for a in order for i, b in enumerate(order) if a < b and i < len(columns[a])}


def read_uuids(listed: str) -> dict[int, str]:
    """UUID of each GPU (without a leading ``GPU-``), from the text of ``nvidia-smi -L``."""
    return {int(number): uuid for number, uuid in _LISTED.findall(_STYLE.sub("", listed))}


def by_uuid(topo: str, listed: str) -> dict[str, str]:
    """Kind of link by the UUIDs of its ends, ``lesser greater``: numbers differ between nvidia-smi and torch."""
    uuids = read_uuids(listed)
    return {
        " ".join(sorted((uuids[a], uuids[b]))): kind
        for (a, b), kind in read_links(topo).items()
        if a in uuids and b in uuids
    }


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that this process sees, in torch's order."""
    found = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    return [uuid.removeprefix("GPU-") for uuid in found]


def ask(*arguments: str) -> str:
    """What nvidia-smi prints, "" if it is not there or fails."""
    command = ["nvidia-smi", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def pair_links(gpus: Sequence[str], node: Sequence[int], links: Mapping[int, Mapping[str, str]]) -> tuple[Link, ...]:
    """The links between ranks.

    gpus: UUID of each rank's GPU, "" for none. node: of each rank. links: what ``by_uuid`` gave on each node.
    """
    found = []
    for b, second in enumerate(gpus):
        for a, first in enumerate(gpus[:b]):
            if first and second and node[a] == node[b]:
                pair = " ".join(sorted((first, second)))
                kind = "SAME" if first == second else links.get(node[a], {}).get(pair, "")
                found += [Link(a, b, kind)] if kind else []
    return tuple(sorted(found))


def find_links(group: Group, gpus: Sequence[str], node: Sequence[int]) -> tuple[Link, ...]:
    """Collective over ``group``, every rank passing the same: on nodes with several GPUs one rank asks nvidia-smi."""
    mates = [r for r in range(group.size) if node[r] == node[group.rank]]
    several = len({gpus[r] for r in mates if gpus[r]}) > 1
    mine = by_uuid(ask("topo", "-m"), ask("-L")) if several and group.rank == mates[0] else {}
    everyone = gather_objects(group, mine)
    return pair_links(gpus, node, {node[r]: told for r, told in enumerate(everyone) if told})
