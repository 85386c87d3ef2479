"""What every launcher must run alike: ``python launched.py TASK OUT.json [wire]``. Rank 0 writes what came out.

TASK: ``launched`` takes the world its launcher announced; ``comm`` gives a communicator of its own MPI;
``adopt`` takes over the world of a DDP program and trains beside it; ``inside`` runs DDP inside triloom's world;
``nccl`` runs a NCCL group over an adopted world, with the stand-in that FAKE_NCCL names.
wire: ranks of this host do not use its shared memory.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import group_cases as cases
import group_refusals as refusals
import parity_cases as parity
import triloom
from group_pairs import BLIND, PAIRS
from nccl_fake import Fake
from shuttle import shuttle
from triloom import boot
from triloom.errors import DeadlineError
from triloom.groups.base import Group
from triloom.groups.by_device import DeviceGroup
from triloom.groups.nccl_world import nccl_group
from triloom.groups.torch_dist import TorchWire
from triloom.groups.wired import WiredGroup

MESHES = {2: {"dp": 2}, 4: {"dp": 2, "tp": 2}}


def matrix(group: Group) -> None:
    """Everything the group must do."""
    for operation in cases.OPERATIONS:
        cases.every_dtype_and_size(group, operation)
    for case in cases.SEVERAL.values():
        case(group)
    blind = isinstance(group, WiredGroup) and isinstance(group._wire, TorchWire) and group._local is None
    for name in (BLIND if blind else PAIRS) if group.size == 2 else ():
        PAIRS[name](group)
    refusals.all_of_them(group)  # leaves operations that never end: the exit must not stumble over them


STEPS = 5


def losses(group: Group, between: Callable[[int], None] = lambda step: None) -> list[str]:
    """Every bit of the losses of five steps; ``between(step)`` is called after each."""
    case = parity.Case("llama", **MESHES[group.size], steps=STEPS, dtype="float32", microbatches=2)
    return [loss.hex() for loss in parity.train(group, case, between).losses]


class DDPProgram:
    """Somebody's DDP training, a step at a time, over the given torch process group (None: torch's world)."""

    def __init__(self, group: Any = None) -> None:
        torch.manual_seed(5)
        layers = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4))
        self.model = DistributedDataParallel(layers, process_group=group)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.rank = dist.get_rank(group)
        self.losses: list[str] = []

    def step(self, step: int) -> None:
        """On this rank's own samples."""
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + self.rank))
        loss = self.model(x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(float(loss.detach()).hex())


def both_under_way(group: Group, torch_group: Any = None) -> None:
    """Operations of triloom and of torch outstanding at the same time, waited for crosswise."""
    ours, theirs = torch.ones(70_000), torch.ones(70_000)
    first = group.all_reduce(ours)
    second = dist.all_reduce(theirs, group=torch_group, async_op=True)
    third = group.all_reduce(torch.ones(3))
    second.wait()
    third.wait()
    first.wait()
    assert ours.eq(group.size).all() and theirs.eq(group.size).all()


def launched(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    world = triloom.init(**options)
    matrix(world.group)
    second = triloom.init(**options)
    x = torch.ones(3)
    second.group.all_reduce(x).wait()
    assert second == world and x.tolist() == [world.size] * 3
    second.close()
    return world, {"losses": losses(world.group)}


def comm(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """Communicators of the program's own MPI, backwards: all its ranks if there are two, else the odd and the even."""
    from mpi4py import MPI  # initialises MPI: the program's, not triloom's

    everyone = MPI.COMM_WORLD
    mine = everyone.Split(everyone.rank % (everyone.size // 2), -everyone.rank)
    world = triloom.init(comm=mine, **options)
    assert (world.rank, world.size, world.launcher) == (mine.rank, mine.size, "comm")
    matrix(world.group)
    found = losses(world.group, lambda step: mine.Barrier())
    assert everyone.allgather(found) == [found] * everyone.size
    return world, {"losses": found}


def adopt(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """A DDP program takes triloom in over its own process group, step by step; then a group of half of its ranks."""
    dist.init_process_group("gloo")
    group = dist.new_group()
    program = DDPProgram(group)
    program.step(0)
    world = triloom.adopt(group, **options)
    assert (world.rank, world.size, world.launcher) == (dist.get_rank(), dist.get_world_size(), "adopted")

    def between(step: int) -> None:
        program.step(step + 1)
        both_under_way(world.group, group)

    found = {"losses": losses(world.group, between), "ddp": program.losses}
    with triloom.adopt(torch.distributed, **options) as whole:  # one of all ranks beside it
        matrix(whole.group)
    halves = [dist.new_group([r for r in range(world.size) if r % 2 == k]) for k in range(2)]
    with triloom.adopt(halves[world.rank % 2], **options) as half:
        x = torch.tensor([float(world.rank)])
        half.group.all_reduce(x).wait()
        assert half.size == world.size // 2 and x.item() == sum(range(world.rank % 2, world.size, 2))
    return world, found


def nccl(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """NCCL's stand-in over an adopted world: its unique id and all that is agreed upon go over gloo."""
    dist.init_process_group("gloo")
    world = triloom.adopt(torch.distributed, **options)
    fake = Fake(Path(os.environ["FAKE_NCCL"]))
    group = nccl_group(world.group, fake.streams(), library=fake.nccl, exact=True, beat=0.1)
    for operation in cases.OPERATIONS.values():
        for dtype in cases.DTYPES:
            operation(shuttle(group), dtype, 1001)
    found = losses(DeviceGroup(world.group, group), lambda step: both_under_way(group))
    assert losses(world.group) == found
    works = [group.all_reduce(torch.ones(5))] if world.rank == 0 else []
    for work in works:
        with pytest.raises(DeadlineError, match=r"all_reduce float32\[5\] sum.*rank 1 had not arrived"):
            work.wait(0.5)
            work.synchronize()  # type: ignore[attr-defined]
    world.group.barrier().wait()
    group.close()
    return world, {"losses": found}


def inside(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """DDP inside the world that triloom made, step by step."""
    world = triloom.init(**options)
    store = world.group.rank == 0 and tempfile.mkdtemp()
    folder = _broadcast(world.group, str(store))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=world.rank, world_size=world.size)
    program = DDPProgram()
    program.step(0)

    def between(step: int) -> None:
        program.step(step + 1)
        both_under_way(world.group)

    found = losses(world.group, between)
    dist.destroy_process_group()
    assert losses(world.group) == found
    return world, {"losses": found, "ddp": program.losses}


def _broadcast(group: Group, value: str) -> str:
    from triloom.groups.objects import broadcast_object

    return str(broadcast_object(group, value))


TASKS = {f.__name__: f for f in (launched, comm, adopt, nccl, inside)}


def main(task: str, out: str, *words: str) -> None:
    options = {"threads": 1, "deadline": 20.0, "shared_memory": "wire" not in words}
    world, found = TASKS[task](options)
    found |= {"launcher": world.launcher, "local": [world.local_rank, world.local_size], "ranks": world.size}
    first = world.rank == 0
    world.close()
    if world.launcher == "adopted":
        ones = torch.ones(2)
        dist.all_reduce(ones)  # closing triloom's world left torch's open
        assert ones.tolist() == [float(found["ranks"])] * 2
        dist.destroy_process_group()
    if first:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
