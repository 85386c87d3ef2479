"""The NCCL group on two ranks that share one GPU (for correctness only), or have one each.

NCCL refuses two ranks on a device unless it is told otherwise: by a switch from 2.30 on, before that
by another host name for each rank, which sends everything through the loopback network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import group_cases as cases
from harness.launcher import mpirun
from shuttle import shuttle
from triloom.boot import World
from triloom.engine import Engine
from triloom.errors import DeadlineError, GroupError
from triloom.groups.by_device import DeviceGroup
from triloom.groups.nccl import load_nccl, version_text
from triloom.groups.nccl_comm import CommConfig
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_streams import CudaStreams
from triloom.groups.nccl_world import nccl_group, sharing_settings
from triloom.mesh import make_mesh
from triloom.models import decoder, llama


def no_mpirun() -> str:
    try:
        mpirun()
    except RuntimeError as error:
        return str(error)
    return ""


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(bool(no_mpirun()), reason=no_mpirun() or "mpirun is there"),
]


@pytest.fixture
def group(world: World) -> Iterator[NCCLGroup]:
    """Skips with NCCL's own words where ranks share a GPU and NCCL does not let them."""
    shared = torch.cuda.device_count() < world.size
    library = load_nccl()
    if shared:
        os.environ.update(sharing_settings(library.version, world.rank))
    world.group.deadline = 60.0
    streams = CudaStreams(world.device)
    try:
        made = nccl_group(world.group, streams, library=library, config=CommConfig(max_ctas=2), exact=True, beat=0.2)
    except GroupError as error:
        if shared:
            pytest.skip(f"NCCL {version_text(library.version)} does not connect two ranks on one GPU: {error}")
        raise
    yield made
    made.close()


@pytest.mark.ranks(2, timeout=200, launch=500)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations(world: World, group: NCCLGroup, operation: str) -> None:
    cases.every_dtype_and_size(shuttle(group), operation)


@pytest.mark.ranks(2, timeout=200, launch=500)
@pytest.mark.parametrize("case", [name for name in cases.SEVERAL if name != "objects"])
def test_several(world: World, group: NCCLGroup, case: str) -> None:
    cases.SEVERAL[case](shuttle(group))


@pytest.mark.ranks(2, timeout=100, launch=500)
def test_a_rank_that_does_not_come_is_named(world: World, group: NCCLGroup) -> None:
    if world.rank == 0:
        work = group.all_reduce(torch.ones(1000, device=world.device))
        work.wait(1.0)
        with pytest.raises(DeadlineError, match=r"all_reduce float32\[1000\] sum #0.*rank 1 had not arrived"):
            work.synchronize()  # type: ignore[attr-defined]
        torch.cuda.synchronize()  # the abort has freed the stream
    world.group.barrier().wait()


@pytest.mark.ranks(2, timeout=100, launch=500)
def test_sequences(world: World, group: NCCLGroup) -> None:
    for _ in range(3):
        group.all_reduce(torch.ones(10, device=world.device)).wait()
    group.check()


def losses(world: World, group: object, *, pp: int) -> list[float]:
    model = decoder(llama(vocab=64, hidden=64, layers=2, heads=4, kv_heads=2, max_seq=16))
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=group, mesh=make_mesh(2, pp=pp, dp=2 // pp), microbatches=2,
        seed=1, device=world.device,
    )  # type: ignore[arg-type]  # fmt: skip
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (4, 17), generator=gen)
    out = [engine.step(ids[:, :-1], ids[:, 1:]).loss for _ in range(4)]
    engine.close()
    return out


@pytest.mark.ranks(2, timeout=200, launch=500)
@pytest.mark.parametrize("pp", [1, 2])
def test_training_gives_the_bits_of_the_staged_host_group(world: World, group: NCCLGroup, pp: int) -> None:
    assert losses(world, DeviceGroup(world.group, group), pp=pp) == losses(world, world.group, pp=pp)
