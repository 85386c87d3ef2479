"""Looks at the host: software, launcher, cores and memory."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..connect import load_mpi
from ..cores import affinity, cpu_quota
from ..leftovers import abandoned
from .base import Place, Seen, mib

PACKAGE = Path(__file__).resolve().parent.parent
SECONDS = 10
"""How long a command may take."""


def output(*command: str) -> str:
    """What a command prints, "" if it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def software(place: Place) -> Seen:
    """Versions; of a checkout also its commit, with "dirty" if files differ from it."""
    state = output("git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    data = {"triloom": __version__, "git": state, "python": platform.python_version(), "torch": torch.__version__}
    return Seen(
        f"triloom {__version__}{f' ({state})' if state else ''}, python {data['python']}, torch {data['torch']}", data
    )


def extension(place: Place) -> Seen:
    found = find_spec("triloom._C")
    path = None if found is None else found.origin
    return Seen("triloom._C is not built" if path is None else f"triloom._C, {Path(path).name}", {"path": path})


def mpi(place: Place) -> Seen:
    """The MPI library that mpi4py loads, without initialising it."""
    try:
        library = load_mpi()
    except (ImportError, RuntimeError) as error:
        return Seen(f"mpi4py finds no MPI: {error}", {"name": None})
    name, version = library.get_vendor()
    text = ".".join(map(str, version))
    return Seen(f"{name} {text}, through mpi4py", {"name": name, "version": text})


def find_mpirun() -> str | None:
    """The mpirun beside this python, or the first on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def mpirun(place: Place) -> Seen:
    path = find_mpirun()
    if path is None:
        return Seen("no mpirun beside this python, none on the path", {"path": None})
    version = launcher_version(output(path, "--version"))
    return Seen(f"{path} ({version})", {"path": path, "version": version})


def launcher_version(text: str) -> str:
    """Name and version from what an mpirun says of itself: the first line with a number, without decoration."""
    line = next((line for line in text.splitlines() if any(c.isdigit() for c in line)), "says no version")
    name = "Hydra " if text.startswith("HYDRA") else ""
    return name + " ".join(
        line.replace("mpiexec", "").replace("(Open MPI)", "Open MPI").replace("Version:", "").split()
    )


def launcher(place: Place) -> Seen:
    world = place.world
    data = {"name": world.launcher, "ranks": world.size}
    return Seen("none, one rank" if world.launcher == "one" else f"{world.launcher}, {world.size} ranks", data)


def cores(place: Place) -> Seen:
    """Physical cores this host's ranks may use and what each rank takes."""
    world, usable, quota = place.world, len(affinity()), cpu_quota()
    limit = "" if quota is None else f", a quota of {quota:g}"
    each = f"{world.threads} thread{'s' * (world.threads > 1)} for each of {world.local_size}"
    data: dict[str, Any] = {"cores": usable, "quota": quota, "threads": world.threads, "ranks": world.local_size}
    return Seen(f"{usable} usable{limit}; {each} rank{'s' * (world.local_size > 1)} here", data)


def memory(place: Place) -> Seen:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Seen(f"{mib(free)} available of {mib(total)}", {"total": total, "available": free})


def shm(place: Place) -> Seen:
    found = os.statvfs("/dev/shm")
    size, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return Seen(f"{mib(free)} free of {mib(size)}", {"size": size, "free": free})


def leftovers(place: Place) -> Seen:
    """Memory that killed jobs of this user still hold in /dev/shm."""
    files = abandoned()
    data = {"files": [str(file) for file in files], "remove": f"rm -f {shlex.join(map(str, files))}"}
    if not files:
        return Seen("none", data)
    held = sum(file.stat().st_blocks * 512 for file in files if file.exists())
    return Seen(f"{len(files)} file{'s' * (len(files) > 1)} of killed MPI jobs: {mib(held)}", data)


def memlock(place: Place) -> Seen:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    return Seen("unlimited" if unlimited else mib(soft), {"bytes": None if unlimited else soft})
