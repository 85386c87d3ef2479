"""Who shares a node, what that means for a mesh, and what is said of it; two hosts by a forced host map."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triloom import boot
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import Mesh, make_mesh
from triloom.topology import (
    Bandwidths,
    Topology,
    crossing,
    describe_placement,
    forced_topology,
    make_topology,
    measure,
    node_key,
    pair_bandwidth,
    placement_note,
    placement_warning,
)

PAIRS = forced_topology(["a", "a", "b", "b"], 4)
ROUND_ROBIN = forced_topology(["a", "b", "a", "b"], 4)


def test_nodes_are_numbered_by_their_lowest_rank() -> None:
    found = make_topology(["y|1", "x|2", "y|1", "z|3"], ["same", "same", "same", "other"])
    assert found == Topology((0, 1, 0, 2), ("same", "same", "other"))  # one host name, two nodes
    assert found.local(2) == (0, 2) and found.local(1) == (1,)
    assert found.sizes == (2, 1, 1) and not found.contiguous
    assert str(found) == "same (2 ranks), same (1 rank), other (1 rank)"


def test_processes_of_one_host_have_one_key() -> None:
    assert node_key() == node_key() and node_key().count("|") == 2


@pytest.mark.parametrize("hosts", [["a"], ["a", ""], "ab", ["a", 1]])
def test_a_host_map_that_does_not_fit_is_refused(hosts: list[str]) -> None:
    with pytest.raises(ConfigError, match="hosts must name a host for each of the 2 ranks, got"):
        forced_topology(hosts, 2)


NO_TP, INSIDE, ACROSS = make_mesh(4, dp=2, pp=2), make_mesh(4, dp=2, tp=2), make_mesh(4, tp=4)
SPREAD = make_mesh(4, dp=2, tp=2, order=("tp", "pp", "dp"))


@pytest.mark.parametrize(
    ("mesh", "topology", "groups"),
    [
        (NO_TP, PAIRS, ()),
        (INSIDE, PAIRS, ()),
        (ACROSS, PAIRS, ((0, 1, 2, 3),)),
        (INSIDE, ROUND_ROBIN, ((0, 1), (2, 3))),
        (SPREAD, PAIRS, ((0, 2), (1, 3))),
        (SPREAD, ROUND_ROBIN, ()),
    ],
)
def test_crossing(mesh: Mesh, topology: Topology, groups: tuple[tuple[int, ...], ...]) -> None:
    assert crossing(mesh, topology) == groups
    assert (placement_warning(mesh, topology) is None) == (not groups)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
def test_the_default_order_keeps_tp_inside_whenever_it_divides_the_node(nodes: int, tp: int, a: int, pp: int) -> None:
    per_node = tp * a
    world = nodes * per_node * pp
    topology = forced_topology([f"h{r // per_node}" for r in range(world)], world)
    assert not crossing(make_mesh(world, pp=pp, tp=tp), topology)


def test_what_is_said_of_tp_inside_nodes() -> None:
    assert placement_note(INSIDE, forced_topology(["a"] * 4, 4)) == "one node: a (4 ranks)"
    assert placement_note(INSIDE, PAIRS) == (
        "2 nodes: a (2 ranks), b (2 ranks); every tp group of 2 ranks is inside a node, "
        "order dp, pp, tp (default order)"
    )
    assert placement_note(SPREAD, ROUND_ROBIN).endswith("order tp, pp, dp")
    assert "tp is 1" in placement_note(NO_TP, PAIRS)


@pytest.mark.parametrize(
    ("mesh", "topology", "says"),
    [
        (ACROSS, PAIRS, r"tp=4 crosses nodes in 1 of 1 groups, the first has ranks a: 0, 1 and b: 2, 3; .*"
                        r"A node has 2 ranks: use parallel.tp 2, or start a multiple of 4 ranks a node"),
        (INSIDE, ROUND_ROBIN, r"tp=2 crosses nodes in 2 of 2 groups.*ranks a: 0 and b: 1; .*mpirun --map-by slot\)"),
        (SPREAD, PAIRS, r"ranks a: 0 and b: 2; .*The order tp, pp, dp spreads tp: use parallel.order dp, pp, tp"),
    ],
)  # fmt: skip
def test_the_warning_names_ranks_and_the_way_out(mesh: Mesh, topology: Topology, says: str) -> None:
    text = placement_warning(mesh, topology) or ""
    assert re.search(f"{says}$", text), text
    measured = placement_warning(mesh, topology, Bandwidths(5.2e9, 1.26e8)) or ""
    assert "Measured between two ranks: 5.2 GB/s inside a node, 0.13 GB/s across." in measured
    alone = placement_warning(mesh, topology, Bandwidths(None, 1e9)) or ""
    assert "Measured between two ranks: 1 GB/s across." in alone


def test_measuring_takes_one_pair_inside_and_one_across() -> None:
    def rank(group: Group) -> tuple[Bandwidths, float]:
        return measure(group, ROUND_ROBIN), pair_bandwidth(group, 1, 3, nbytes=4096, repeats=1)

    found = run_threads(4, rank)
    assert found.count(found[0]) == 4  # every rank knows
    bandwidths, small = found[0]
    assert bandwidths.inside and bandwidths.outside and small > 0
    alone = run_threads(2, lambda group: measure(group, forced_topology(["a", "b"], 2)))[0]
    assert alone.inside is None and alone.outside
    assert run_threads(2, lambda group: measure(group, forced_topology(["a", "a"], 2)))[1].outside is None


def test_init_reads_or_takes_the_hosts() -> None:
    def rank(group: Group) -> tuple[boot.World, boot.World]:
        found = boot.init(group=group, hooks=False, threads=1, device="cpu")
        forced = boot.init(group=group, hooks=False, threads=1, device="cpu", hosts=["a", "b", "a"])
        return found, forced

    for r, (found, forced) in enumerate(run_threads(3, rank)):
        assert (found.local_rank, found.local_size, len(found.topology.names)) == (r, 3, 1)
        assert (forced.local_rank, forced.local_size) == ((0, 2), (0, 1), (1, 2))[r]
        assert forced.topology == Topology((0, 1, 0), ("a", "b"))


def test_one_node_is_not_worth_a_word_and_crossing_ones_are_measured() -> None:
    def rank(group: Group) -> list[str | None]:
        one = forced_topology(["a"] * 4, 4)
        return [describe_placement(group, ACROSS, where) for where in (one, PAIRS)] + [
            describe_placement(group, INSIDE, PAIRS)
        ]

    silent, warning, note = run_threads(4, rank)[0]
    assert silent is None
    assert re.match(r"warning: tp=4 crosses nodes.*Measured between two ranks: \S+ GB/s inside", warning or "")
    assert (note or "").startswith("2 nodes: a (2 ranks), b (2 ranks); every tp group of 2 ranks is inside a node")


def test_training_tells_a_mesh_that_crosses_nodes(tmp_path_factory: pytest.TempPathFactory) -> None:
    from triloom.config import load
    from triloom.train import train

    folder = tmp_path_factory.mktemp("crossing")
    text = folder / "text.txt"
    text.write_text("to be or not to be\n" * 100)
    words = ["--model.layers=1", "--model.hidden=16", "--model.heads=2", "--model.seq=16", "--train.batch=2"]
    words += ["--train.steps=1", "--train.eval_batches=0", "--data.held_out=0", "--parallel.tp=2", "--run.plot=false"]
    words += [f"--data.path={text}", f"--run.dir={folder / 'run'}"]
    config = load(words, None).config
    out = io.StringIO()

    def rank(group: Group) -> None:
        world = boot.init(group=group, hooks=False, threads=1, device="cpu", hosts=["a", "b"])
        train(config, world, out=out)

    run_threads(2, rank)
    assert "warning: tp=2 crosses nodes in 1 of 1 groups, the first has ranks a: 0 and b: 1" in out.getvalue()
