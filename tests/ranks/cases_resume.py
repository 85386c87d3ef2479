"""Runs under mpirun that are killed and go on: ``python cases_resume.py TASK FOLDER``; rank 0 writes what it found.

Four ranks; the meshes of fewer are made of the first ones. ``before``: 20 steps of each mesh without a break; then 12
with a checkpoint of the tenth, and at the end one rank is killed while another save is under way. ``after``: from the
tenth step to the twentieth, in new processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import checkpoint_cases as cases
import triloom
from triloom.groups.base import Group

NAMES = ("one", "dp2", "tp2", "pp2", "dp2_pp2")


def whole(world: Group, folder: Path, name: str) -> list[str]:
    engine = cases.make_engine(world, cases.variants()[name])
    cases.steps(engine, 10)
    told = cases.steps(engine, 10)
    engine.save(folder / f"{name}-whole")
    engine.close()
    return told.losses + told.norms


def broken(world: Group, folder: Path, name: str) -> list[str]:
    engine = cases.make_engine(world, cases.variants()[name])
    checkpoints = triloom.Checkpoints(engine, folder / name, every=5)
    for _ in range(12):
        checkpoints.after(cases.step(engine))
    checkpoints.finish()
    if name == NAMES[-1]:
        checkpoints.save()
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.finish()  # never: rank 1 is gone
    engine.close()
    return []


def resumed(world: Group, folder: Path, name: str) -> list[str]:
    engine = cases.make_engine(world, cases.variants()[name])
    checkpoints = triloom.Checkpoints(engine, folder / name, every=5)
    restored = checkpoints.resume()
    assert restored is not None and engine.steps == restored.step == 10, restored
    told = cases.steps(engine, 10)
    engine.save(folder / f"{name}-resumed")
    engine.close()
    return told.losses + told.norms


def each(world: Group, folder: Path, run: Callable[[Group, Path, str], list[str]]) -> None:
    """All meshes, one after the other."""
    found = {}
    for name in NAMES:
        ranks = cases.variants()[name].ranks
        part = world.split([list(range(ranks))], f"{run.__name__}-{name}")
        if world.rank < ranks:
            found[name] = run(part, folder, name)
        world.barrier().wait()
    if world.rank == 0:
        (folder / f"{run.__name__}.json").write_text(json.dumps(found))


TASKS = {"before": (whole, broken), "after": (resumed,)}


def main(task: str, folder: Path) -> None:
    torch.manual_seed(5)  # every process has another seed, and the state of torch's generator is stored too
    with triloom.init(threads=1, deadline=30.0) as world:
        for run in TASKS[task]:
            each(world.group, folder, run)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
