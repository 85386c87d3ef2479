"""What every launcher must run alike: ``python launched.py TASK OUT.json [wire]``. Rank 0 writes what came out.

TASK: ``launched`` takes the world its launcher announced; ``comm`` gives half of MPI's world as a communicator;
``adopt`` takes over the world of a DDP program and trains beside it; ``inside`` runs DDP inside triloom's world.
wire: ranks of this host do not use its shared memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import group_cases as cases
import parity_cases as parity
import triloom
from triloom import boot
from triloom.groups.base import Group

MESHES = {2: {"dp": 2}, 4: {"dp": 2, "tp": 2}}


def matrix(group: Group) -> None:
    """Everything the group must do."""
    for operation in cases.OPERATIONS:
        cases.every_dtype_and_size(group, operation)
    for case in cases.SEVERAL.values():
        case(group)
    for name in cases.DISAGREEMENTS:
        cases.disagreement(group, name)
    for case in cases.ABSENT.values():  # leaves operations that never end: the exit must not stumble over them
        case(group)


def losses(group: Group) -> list[str]:
    """Three steps; every bit of the losses."""
    case = parity.Case("llama", **MESHES[group.size], steps=3, dtype="float32", microbatches=2)
    return [loss.hex() for loss in parity.train(group, case).losses]


def ddp_steps(model: torch.nn.Module, rank: int, steps: range) -> list[str]:
    """Steps of a DDP model, each on this rank's own samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss).hex())
    return found


def ddp_model() -> torch.nn.Module:
    torch.manual_seed(5)
    return DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 4)))


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
    """The odd and the even ranks of MPI's world, backwards, as worlds of their own."""
    from mpi4py import MPI  # initialises MPI: the program's, not triloom's

    mine = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2, -MPI.COMM_WORLD.rank)
    world = triloom.init(comm=mine, **options)
    assert (world.rank, world.size, world.launcher) == (mine.rank, mine.size, "comm")
    matrix(world.group)
    found = losses(world.group)
    everyone = MPI.COMM_WORLD.allgather(found)
    assert everyone == [found] * MPI.COMM_WORLD.size
    return world, {"losses": found}


def adopt(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """A DDP program that takes triloom in, between two of its steps, then once more for half of its ranks."""
    dist.init_process_group("gloo")
    model = ddp_model()
    before = ddp_steps(model, dist.get_rank(), range(1))
    world = triloom.boot.adopt(torch.distributed, **options)
    assert (world.rank, world.size, world.launcher) == (dist.get_rank(), dist.get_world_size(), "adopted")
    between = ddp_steps(model, world.rank, range(1, 2))
    found = {"losses": losses(world.group), "ddp": before + between + ddp_steps(model, world.rank, range(2, 3))}
    halves = [dist.new_group([r for r in range(world.size) if r % 2 == k]) for k in range(2)]
    with triloom.boot.adopt(halves[world.rank % 2], **options) as half:
        x = torch.tensor([float(world.rank)])
        half.group.all_reduce(x).wait()
        assert half.size == world.size // 2 and x.item() == sum(range(world.rank % 2, world.size, 2))
    return world, found


def inside(options: dict[str, Any]) -> tuple[boot.World, dict[str, Any]]:
    """DDP inside the world that triloom made."""
    world = triloom.init(**options)
    first = losses(world.group)
    store = world.group.rank == 0 and tempfile.mkdtemp()
    folder = _broadcast(world.group, str(store))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=world.rank, world_size=world.size)
    model = ddp_model()
    steps = ddp_steps(model, world.rank, range(2))
    again = losses(world.group)
    steps += ddp_steps(model, world.rank, range(2, 3))
    dist.destroy_process_group()
    assert losses(world.group) == again == first
    return world, {"losses": first, "ddp": steps}


def _broadcast(group: Group, value: str) -> str:
    from triloom.groups.objects import broadcast_object

    return str(broadcast_object(group, value))


TASKS = {f.__name__: f for f in (launched, comm, adopt, inside)}


def main(task: str, out: str, *words: str) -> None:
    options = {"threads": 1, "deadline": 20.0, "shared_memory": "wire" not in words}
    world, found = TASKS[task](options)
    found |= {"launcher": world.launcher, "local": [world.local_rank, world.local_size], "ranks": world.size}
    first = world.rank == 0
    world.close()
    if task == "adopt":
        ones = torch.ones(2)
        dist.all_reduce(ones)  # closing triloom's world left torch's open
        assert ones.tolist() == [float(found["ranks"])] * 2
        dist.destroy_process_group()
    if first:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
