"""Meshes and engines on NCCL groups: links per direction, and host and device transports side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nccl_fake import Fake
from parity_cases import Case, same_bits, train
from triloom.errors import ConfigError, MeshError
from triloom.groups.base import Group, Transfer
from triloom.groups.by_device import DeviceGroup
from triloom.groups.links import make_links, phases
from triloom.groups.mesh_groups import mesh_groups
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_world import device_world
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh

# -- links, meshes and engines -----------------------------------------------------------------------


@pytest.mark.parametrize("size", range(1, 10))
def test_phases(size: int) -> None:
    """Every neighbour pair once, no rank twice in a round, at most three rounds."""
    rounds = phases(size)
    pairs = [pair for one in rounds for pair in one]
    ring = {frozenset((r, (r + 1) % size)) for r in range(size) if size > 1}
    assert len(pairs) == len(ring) and {frozenset(p) for p in pairs} == ring
    for one in rounds:
        ranks = [r for pair in one for r in pair]
        assert len(set(ranks)) == len(ranks)
    assert len(rounds) <= 3


@pytest.mark.parametrize("n", [2, 3, 4])
def test_links_carry_both_ways_at_once(n: int) -> None:
    """Sends and receives with both neighbours, on FIFO lanes, in the order that deadlocks on one lane."""

    def body(world: Group) -> None:
        links = make_links(world)
        me, out, got = world.rank, torch.full((3,), float(world.rank)), {}
        works = []
        for peer in sorted({(me + 1) % n, (me - 1) % n}):
            group, rank = links[peer, "send"]
            works.append(group.send(out, rank))
        for peer in sorted({(me + 1) % n, (me - 1) % n}):
            group, rank = links[peer, "recv"]
            got[peer] = torch.empty(3)
            works.append(group.recv(got[peer], rank))
        for work in works:
            work.wait()
        assert all(x.tolist() == [float(peer)] * 3 for peer, x in got.items())

    run_threads(n, body, lanes="fifo")


def test_a_mesh_on_fifo_lanes_has_links(fake: Fake) -> None:
    def body(world: NCCLGroup) -> None:
        groups = mesh_groups(world, make_mesh(4, pp=4))
        assert groups.lanes == "per_direction"
        me = groups.coords["pp"]
        ahead, rank = groups.link((me + 1) % 4, "send")
        behind, other = groups.link((me + 1) % 4, "recv")
        assert ahead is not behind and (ahead.size, ahead.rank, rank, other) == (2, 0, 1, 0)
        with pytest.raises(MeshError, match="no neighbours"):
            groups.link((me + 2) % 4, "send")
        groups.check()
        groups.close()

    fake.run(4, body)


def test_a_mesh_on_independent_lanes_has_none() -> None:
    def body(world: Group) -> None:
        groups = mesh_groups(world, make_mesh(2, pp=2))
        assert groups.lanes == "independent" and groups.link(1 - world.rank, "send")[0] is world
        groups.check()

    run_threads(2, body)


ENGINES = [
    Case("gpt2", dp=2, pp=2, microbatches=4, steps=2, dtype="float32"),
    Case("llama", pp=4, microbatches=4, steps=2, dtype="float32", placement="zero2"),
    Case("llama_gqa_tied", pp=2, tp=2, microbatches=3, steps=2, dtype="float32", sequence=True),
    Case("gpt2", dp=3, microbatches=2, steps=2, dtype="bfloat16", placement="zero3"),
]


@pytest.mark.parametrize("case", ENGINES, ids=lambda c: f"{c.model}-dp{c.dp}-pp{c.pp}-tp{c.tp}-{c.placement}")
def test_training_gives_the_bits_of_the_host_groups(fake: Fake, case: Case) -> None:
    """The engine, on one communicator and stream per direction of the pipeline."""
    want = run_threads(case.ranks, lambda world: train(world, case))
    got = fake.run(case.ranks, lambda world: train(world, case), exact=True)
    for one, two in zip(got, want, strict=True):
        same_bits(one, two)


# -- host and device ---------------------------------------------------------------------------------


class Told:
    """Stands for a group: remembers which of its methods were called."""

    def __init__(self, device: str) -> None:
        self.name, self.rank, self.size, self.members, self.lanes, self.deadline = "g", 0, 2, (0, 1), "fifo", 1.0
        self.streams = FakeDevice(device)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self.calls.append(name)


class FakeDevice:
    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


def test_each_tensor_goes_over_its_own_transport() -> None:
    host, device = Told("cpu"), Told("meta")
    group: Any = DeviceGroup(host, device)  # type: ignore[arg-type]
    calls = ("all_reduce", "broadcast", "reduce_scatter", "all_gather", "all_to_all")
    for where, told in (("cpu", host), ("meta", device)):
        x = torch.empty(2, device=where)
        for name in calls:
            getattr(group, name)(*([x] if name in ("all_reduce", "broadcast") else [x, x]))
        group.send(x, 1)
        group.recv(x, 1)
        assert told.calls == [*calls, "send", "recv"]
    group.all_reduce(torch.empty(2).numpy())
    assert host.calls[-1] == "all_reduce"
    group.batch([Transfer("send", torch.empty(2), 1), Transfer("recv", torch.empty(2, device="meta"), 1)])
    assert host.calls[-1] == device.calls[-1] == "batch"
    group.barrier()
    assert host.calls[-1] == "barrier"
    group.deadline = 7.0
    assert host.deadline == device.deadline == 7.0 and group.lanes == "fifo"


def test_a_split_of_both(fake: Fake) -> None:
    def body(device: NCCLGroup) -> None:
        group = DeviceGroup(device.control, device)
        sub = group.split([[2, 0], [1]], "ends")
        if group.rank == 1:
            assert isinstance(sub, Solo)
        else:
            assert isinstance(sub, DeviceGroup) and sub.members == (2, 0) and sub.rank == (group.rank == 0)
            assert sub.host is sub.device.control and sub.host.members == (2, 0)
            x = torch.ones(2)
            sub.host.all_reduce(x).wait()
            sub.device.all_reduce(x).wait()
            assert x.tolist() == [4.0, 4.0]
        sub.close()

    fake.run(3, body)


def test_device_world_without_gpus() -> None:
    solo = Solo()
    assert device_world(solo, torch.device("cpu")) is solo

    def body(control: Group) -> None:
        assert device_world(control, torch.device("cpu")) is control
        with pytest.raises(ConfigError, match="same type of device, got rank 0: cpu, rank 1: meta"):
            device_world(control, torch.device("meta" if control.rank else "cpu"))
        with pytest.raises(ConfigError, match=f"rank {control.rank}: there is no device transport for meta"):
            device_world(control, torch.device("meta"))

    run_threads(2, body)
