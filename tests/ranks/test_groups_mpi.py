"""The MPI group: the shared cases, and what only processes have (progress thread, abandoned work)."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator

import pytest
import torch

import group_cases as cases
import group_refusals as refusals
from group_cases import draw, in_order
from group_pairs import PAIRS
from triloom.boot import World
from triloom.errors import DeadlineError, MismatchError
from triloom.groups.base import Transfer, Work
from triloom.groups.mesh_groups import mesh_groups
from triloom.groups.mpi import MPIGroup
from triloom.groups.wired import WiredGroup
from triloom.mesh import make_mesh


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """This rank's World with a group that sends messages, though its ranks share a host."""
    assert isinstance(world.group, MPIGroup)
    group = MPIGroup(world.group._wire.comm, deadline=world.group.deadline, shared=None)
    yield dataclasses.replace(world, group=group)
    group.close()


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations(world: World, operation: str) -> None:
    cases.every_dtype_and_size(world.group, operation)


@pytest.mark.full
@pytest.mark.ranks(3, 5, 6, timeout=150, launch=600)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations_of_many(world: World, operation: str) -> None:
    cases.every_dtype_and_size(world.group, operation)


@pytest.mark.full
@pytest.mark.ranks(3, 5, 6, timeout=150, launch=600)
def test_rules_of_many(world: World) -> None:
    for several in cases.SEVERAL.values():
        several(world.group)
    refusals.all_of_them(world.group)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("case", cases.SEVERAL)
def test_several(world: World, case: str) -> None:
    cases.SEVERAL[case](world.group)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("case", refusals.DISAGREEMENTS)
def test_disagreement(world: World, case: str) -> None:
    refusals.disagreement(world.group, case)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("case", refusals.ABSENT)
def test_absent(world: World, case: str) -> None:
    refusals.ABSENT[case](world.group)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", PAIRS)
def test_pair(world: World, case: str) -> None:
    PAIRS[case](world.group)


@pytest.mark.ranks(2)
def test_data_that_does_not_come_is_told_from_a_rank_that_does_not(world: World) -> None:
    """Rank 1 sends its header and freezes before the data."""
    group = world.group.split([[0, 1]], "frozen")
    assert isinstance(group, WiredGroup)
    x = torch.ones(1 << 20)
    if world.rank == 0:
        time.sleep(0.2)
        with pytest.raises(DeadlineError, match="all ranks had arrived, but the data of rank 1 had not"):
            group.all_reduce(x).wait(0.4)
    else:
        work = group.all_reduce(x)
        with group._shared.progress.lock:  # nothing of this process moves
            time.sleep(1.0)
        work.wait(20)  # rank 0's progress thread still does its part
        assert x[0] == 2.0
    world.group.barrier().wait(20)


@pytest.mark.ranks(2)
def test_unchecked_group_gives_the_same(world: World) -> None:
    """``check=False`` exists to measure what the check costs."""
    assert isinstance(world.group, MPIGroup)
    group = MPIGroup(world.group._wire.comm, name="unchecked", check=False, shared=None)
    for operation in cases.OPERATIONS.values():
        for numel in (7, 40_003):
            operation(group, torch.float32, numel)
    group.close()


@pytest.mark.ranks(4)
def test_mesh_groups(world: World) -> None:
    mesh = make_mesh(4, dp=2, tp=2)
    groups = mesh_groups(world.group, mesh)
    for axes in (("dp",), ("tp",), ("dp", "tp"), ("pp",)):
        group = groups.over(*axes)
        assert group.members == mesh.peers(world.rank, *axes)
        got = torch.empty(group.size, dtype=torch.int64)
        group.all_gather(got, torch.tensor([world.rank])).wait()
        assert tuple(got.tolist()) == group.members
    groups.close()
    with pytest.raises(MismatchError, match="disagree on the mesh"):
        mesh_groups(world.group, make_mesh(4, pp=1 if world.rank else 2))


@pytest.mark.ranks(2)
def test_many_small_operations_keep_nothing(world: World) -> None:
    """Header slots and buffers are reused: their number follows what is outstanding, not what has passed."""
    group = world.group
    assert isinstance(group, MPIGroup)
    x = torch.ones(4)
    for _ in range(300):
        group.all_reduce(x, "max").wait()
    group.barrier().wait()
    assert len(group._slots) <= 3
    assert not group._shared.progress.outstanding(lambda job: job.over is False)


@pytest.mark.ranks(2)
def test_long_messages_go_in_pieces(world: World) -> None:
    """What is over 1 GiB is sent in pieces; here over 10,001 bytes."""
    assert isinstance(world.group, MPIGroup)
    world.group._wire.piece_bytes = 10_001
    for operation in cases.OPERATIONS.values():
        operation(world.group, torch.float64, 50_003)


@pytest.mark.ranks(4)
def test_random_programs(world: World) -> None:
    """Collectives of three groups and transfers, issued in one random order on all ranks, waited in another on each."""
    group = world.group
    subs = [group, group.split([[0, 2], [1, 3]], "columns"), group.split([[3, 2], [1, 0]], "rows")]
    together, alone = random.Random(7), random.Random(world.rank)
    for _ in range(15):
        under_way: list[tuple[Work, torch.Tensor, torch.Tensor]] = []
        for salt in range(12):
            of, numel = together.choice(subs), together.choice((1, 700, 9000, 120_000))
            ranks = [group.members.index(m) for m in of.members]
            inputs = [draw(r, torch.float32, numel, salt) for r in ranks]
            mine, peer = inputs[of.rank], (of.rank + of.size // 2) % of.size
            if together.random() < 0.5:
                want = in_order([x.clone() for x in inputs], "sum")
                under_way.append((of.all_reduce(mine), mine, want))
            else:
                got = torch.zeros(numel)
                batch = [Transfer("recv", got, peer), Transfer("send", mine, peer)]
                alone.shuffle(batch)
                under_way.append((of.batch(batch), got, inputs[peer].clone()))
        alone.shuffle(under_way)
        for work, got, want in under_way:
            work.wait(20)
            assert torch.equal(got, want)
    for sub in subs[1:]:
        sub.close()
