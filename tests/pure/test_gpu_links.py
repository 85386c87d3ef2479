"""Links between GPUs from recorded texts of nvidia-smi, and what is said of a mesh over them."""

from __future__ import annotations

import re

import pytest
import torch

from triloom import boot, gpu_links
from triloom.gpu_links import Link, by_uuid, pair_links, read_links, read_uuids, speed, words
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.topology import Topology, describe_placement, placement_note, slow_links

TOPO = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\tSYS\tPIX\t0-47\t0\tN/A
GPU1\tNV12\t X \tSYS\tSYS\tPXB\t0-47\t0\tN/A
GPU2\tSYS\tSYS\t X \tNV12\tSYS\t48-95\t1\tN/A
GPU3\tSYS\tSYS\tNV12\t X \tSYS\t48-95\t1\tN/A
NIC0\tPIX\tPXB\tSYS\tSYS\t X \t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NV#  = Connection traversing a bonded set of # NVLinks
"""
FULL = re.sub("SYS", "NV18", TOPO.replace("NV12", "NV18").split("NIC0\tPIX")[0])
LISTED = "".join(f"GPU {i}: NVIDIA A100-SXM4-80GB (UUID: GPU-{c * 8}-0000)\n" for i, c in enumerate("abcd"))
A, B, C, D = (f"{c * 8}-0000" for c in "abcd")


def test_the_matrix_is_read() -> None:
    assert read_links(TOPO) == {
        (0, 1): "NV12", (0, 2): "SYS", (0, 3): "SYS", (1, 2): "SYS", (1, 3): "SYS", (2, 3): "NV12",
    }  # fmt: skip
    assert set(read_links(FULL).values()) == {"NV18"}
    assert read_links("No devices were found") == read_links("") == {}


def test_uuids_are_read() -> None:
    assert read_uuids(LISTED) == {0: A, 1: B, 2: C, 3: D}
    assert by_uuid(TOPO, LISTED)[f"{A} {B}"] == "NV12" and by_uuid(TOPO, "") == {}


def test_kinds_are_ordered_and_named() -> None:
    assert sorted(["SYS", "NV4", "PHB", "SAME", "PIX", "WAT"], key=speed) == ["SAME", "NV4", "PIX", "PHB", "SYS", "WAT"]
    assert words("NV18") == "NV18 (NVLink)" and words("WAT") == "WAT"


def test_links_of_ranks() -> None:
    """Torch's numbers may be any permutation; two nodes; a GPU of two ranks; a rank without one."""
    links = {0: by_uuid(TOPO, LISTED), 1: by_uuid(FULL, LISTED)}
    found = pair_links([A, C, B, "", D, D, A], [0, 0, 0, 0, 1, 1, 1], links)
    assert found == (
        Link(0, 1, "SYS"), Link(0, 2, "NV12"), Link(1, 2, "SYS"),
        Link(4, 5, "SAME"), Link(4, 6, "NV18"), Link(5, 6, "NV18"),
    )  # fmt: skip


def topology(order: str, topo: str = TOPO) -> Topology:
    gpus = [{"a": A, "b": B, "c": C, "d": D}[c] for c in order]
    return Topology((0,) * 4, ("host",), pair_links(gpus, (0,) * 4, {0: by_uuid(topo, LISTED)}))


def test_tp_over_linked_gpus_is_said() -> None:
    mesh = make_mesh(4, dp=2, tp=2)
    assert slow_links(mesh, topology("abcd")) is None
    assert (
        placement_note(mesh, topology("abcd"))
        == "one node: host (4 ranks); every tp group of 2 ranks over NV12 (NVLink)"
    )
    assert placement_note(make_mesh(4), topology("abcd")) == "one node: host (4 ranks)"
    two = Topology((0, 0, 1, 1), ("x", "y"), (Link(0, 1, "NV4"), Link(2, 3, "PIX")))
    assert "inside a node over PIX (one PCIe switch), order" in placement_note(mesh, two)


@pytest.mark.parametrize(("order", "tp", "ranks"), [("acbd", 2, "0 and 1"), ("abcd", 4, "0 and 2")])
def test_tp_over_a_slow_link_draws_a_warning(order: str, tp: int, ranks: str) -> None:
    text = slow_links(make_mesh(4, dp=4 // tp, tp=tp), topology(order)) or ""
    assert text.startswith(f"tp={tp} goes over SYS (PCIe across NUMA nodes) between ranks {ranks} of host, where other")
    assert "have NV12 (NVLink)" in text and "CUDA_VISIBLE_DEVICES" in text
    assert slow_links(make_mesh(4, dp=4 // tp, tp=tp), topology(order, FULL)) is None
    assert slow_links(make_mesh(4, pp=4), topology(order)) is None


def test_a_node_without_better_links_is_not_complained_of() -> None:
    only_pcie = TOPO.replace("NV12", "SYS")
    assert slow_links(make_mesh(4, tp=4), topology("abcd", only_pcie)) is None


def test_ranks_on_the_cpu_or_on_one_gpu_ask_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*arguments: str) -> str:
        raise AssertionError(arguments)

    monkeypatch.setattr(gpu_links, "ask", ask)
    monkeypatch.setattr(boot, "visible_gpus", lambda: [A])
    monkeypatch.setattr(boot, "choose_device", lambda device, local_rank: torch.device(device or "cuda:0"))
    for device, links in (("cpu", ()), (None, (Link(0, 1, "SAME"),))):

        def rank(group: Group, device: str | None = device) -> Topology:
            return boot.init(group=group, hooks=False, threads=1, device=device).topology

        assert run_threads(2, rank)[0].links == links


def test_init_reads_the_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPUs and nvidia-smi are recorded ones; the ranks are on the meta device, as there is no CUDA."""
    asked: list[tuple[str, ...]] = []

    def ask(*arguments: str) -> str:
        asked.append(arguments)
        return TOPO if arguments[0] == "topo" else LISTED

    def choose(device: object, local_rank: int) -> torch.device:
        return torch.device("cuda", local_rank)

    monkeypatch.setattr(gpu_links, "ask", ask)
    monkeypatch.setattr(boot, "visible_gpus", lambda: [A, C, B, D])
    monkeypatch.setattr(boot, "choose_device", choose)

    def rank(group: Group) -> tuple[Topology, str | None]:
        world = boot.init(group=group, hooks=False, threads=1)
        return world.topology, describe_placement(group, make_mesh(4, dp=2, tp=2), world.topology)

    found = run_threads(4, rank)
    assert sorted(asked) == [("-L",), ("topo", "-m")]  # one rank of the node
    assert all(one == found[0] for one in found)
    topology, said = found[0]
    assert Link(0, 2, "NV12") in topology.links and len(topology.links) == 6
    assert (said or "").startswith("warning: tp=2 goes over SYS")
