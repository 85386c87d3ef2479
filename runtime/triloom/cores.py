"""The cores this process may use, and its share of them among the ranks of its host."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def affinity() -> frozenset[str]:
    """Physical cores this process may run on, named by their hardware threads (``"0,64"``)."""
    return frozenset(_core(cpu) for cpu in os.sched_getaffinity(0))


def _core(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    with suppress(OSError):  # sandboxes hide it: then every hardware thread counts as a core
        return path.read_text().strip()
    return str(cpu)


def share_cores(cores: Sequence[frozenset[str]], local_rank: int, quota: float | None = None) -> int:
    """Threads for a local rank: each core is divided among the ranks that may run on it; at least 1.

    quota: cores' worth of time the container may use (all local ranks together), if it is limited.
    """
    sharing = Counter(core for mine in cores for core in mine)
    share = sum(1.0 / sharing[core] for core in cores[local_rank])
    if quota is not None:
        share = min(share, quota / len(cores))
    return max(1, int(share + 1e-6))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that control groups (version 2) grant this container; None if unlimited."""
    with suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    return None
