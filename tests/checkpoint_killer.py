"""Kill a process at random moments of its saves, again and again: ``python checkpoint_killer.py FOLDER KILLS SEED``.

One process imports torch and forks; each child trains nothing, but fills its state with the number of a step and
saves, as fast as it can. After each kill the folder must hold a checkpoint of one step, whole, and no older one than
before. Prints what happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from functools import reduce
from operator import or_
from pathlib import Path

import torch

from triloom.checkpoint import Checkpoints, found, path_of, read_tensor, verify
from triloom.engine import Engine, Metrics
from triloom.parallel.build import mean_loss

WIDTH = 300


def make_engine() -> Engine:
    return Engine([torch.nn.Linear(WIDTH, WIDTH)], mean_loss(torch.nn.functional.mse_loss))


def fill(engine: Engine, step: int) -> None:
    engine.steps = step
    with engine.gathered():
        for p in engine.modules[0].parameters():
            p.data.fill_(step)
    for bucket in engine.state.buckets:
        for state in bucket.states.values():
            state.fill_(step)


def write(folder: Path, asynchronous: bool, ready: int) -> None:
    """A child: saves until it is killed."""
    engine = make_engine()
    checkpoints = Checkpoints(engine, folder, every=1, keep=2, asynchronous=asynchronous)
    step = max(found(folder), default=0)
    os.write(ready, b"x")
    while True:
        step += 1
        fill(engine, step)
        notices = reduce(or_, (ask() for ask in engine.totals.notices))
        checkpoints.after(Metrics(step, 0.0, 0.0, 0.0, 0.0, notices=notices))


def check(folder: Path, least: int) -> int:
    """The newest step: its checkpoint is whole and nothing in it is of another step."""
    newest = found(folder)[-1]
    assert newest >= least, f"step {newest} after {least}"
    manifest = verify(path_of(folder, newest))
    assert manifest.step == newest == manifest.state["steps"]
    for name in manifest.tensors:
        if not name.startswith("rng/"):
            values = read_tensor(path_of(folder, newest), manifest, name)
            assert bool((values == newest).all()), f"{name} of step {newest} holds {values.unique().tolist()}"
    return newest


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    newest, left, saves = 0, 0, 0
    for kill in range(kills):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write(folder, kill % 2 == 0, tell)
            finally:
                os._exit(1)
        os.read(ready, 1)
        until = time.monotonic() + draw.uniform(0.0, 0.1)
        while time.monotonic() < until or not found(folder):
            time.sleep(0.0002)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the child ended by itself: {status}"
        os.close(ready)
        os.close(tell)
        left += any(".tmp-" in name for name in os.listdir(folder))
        before, newest = newest, check(folder, newest)
        saves += newest - before
    print(json.dumps({"kills": kills, "interrupted": left, "saves": saves}))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    main(place, int(sys.argv[2]), int(sys.argv[3]))
    shutil.rmtree(place)
