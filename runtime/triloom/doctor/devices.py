"""Looks at GPUs, the links between them, and NCCL."""

from __future__ import annotations

import torch

from ..gpu_links import read_links, words
from .base import Place, Seen, mib
from .host import output


def gpus(place: Place) -> Seen:
    """The GPUs that torch sees, and whether the machine has more than torch can use."""
    listed = [line for line in output("nvidia-smi", "-L").splitlines() if line.startswith("GPU ")]
    count = torch.cuda.device_count()
    data = {"count": count, "listed": len(listed), "cuda": torch.version.cuda, "driver": None}
    if not count:
        what = f"nvidia-smi lists {len(listed)}, torch sees none" if listed else "none"
        return Seen(what, data)
    data["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0") or None
    names = [torch.cuda.get_device_properties(i) for i in range(count)]
    kinds = dict.fromkeys(f"{p.name}, {mib(p.total_memory)}" for p in names)
    return Seen(f"{count} x {' / '.join(kinds)}; CUDA {data['cuda']}, driver {data['driver']}", data)


def links(place: Place) -> Seen:
    """How the GPUs of this host reach each other."""
    if torch.cuda.device_count() < 2:
        return Seen("fewer than two GPUs", {"links": {}, "slow": False})
    found = read_links(output("nvidia-smi", "topo", "-m"))
    if not found:
        return Seen("nvidia-smi topo -m says nothing", {"links": {}, "slow": False})
    counts: dict[str, int] = {}
    for kind in found.values():
        counts[kind] = counts.get(kind, 0) + 1
    said = [f"{n} pair{'s' * (n > 1)} over {words(kind)}" for kind, n in counts.items()]
    pairs = {f"{a}-{b}": kind for (a, b), kind in found.items()}
    return Seen(", ".join(said), {"links": pairs, "slow": any(kind in ("SYS", "NODE") for kind in counts)})


def nccl(place: Place) -> Seen:
    """The NCCL library that groups on GPUs would use, and where it was found."""
    from ..errors import GroupError
    from ..groups.nccl import load_nccl, version_text

    wanted = torch.cuda.device_count() > 0
    try:
        library = load_nccl()
    except GroupError as error:
        says = str(error) if wanted else "none; without GPUs nothing needs it"
        return Seen(says, {"version": None, "path": None, "wanted": wanted})
    data = {"version": version_text(library.version), "path": library.path, "wanted": wanted}
    return Seen(f"{data['version']}, {data['path']}", data)
