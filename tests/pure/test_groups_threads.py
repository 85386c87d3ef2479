"""Groups of one process: Solo and ranks as threads."""

from __future__ import annotations

import time

import pytest
import torch

import group_cases as cases
import group_refusals as refusals
from triloom.errors import DeadlineError, DeadlockError, GroupError, MeshError, MismatchError
from triloom.groups.base import Group
from triloom.groups.mesh_groups import mesh_groups
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_solo_operations(operation: str) -> None:
    cases.every_dtype_and_size(Solo(), operation)


@pytest.mark.parametrize("case", cases.SEVERAL)
def test_solo_several(case: str) -> None:
    cases.SEVERAL[case](Solo())


def test_solo_refuses() -> None:
    with pytest.raises(GroupError, match="rank 0 of group 'solo' cannot send to or receive from peer 0"):
        Solo().send(torch.ones(1), 0)
    with pytest.raises(MismatchError, match="must have 1 x 2 = 2"):
        Solo().all_gather(torch.ones(3), torch.ones(2))


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_operations(n: int, operation: str) -> None:
    run_threads(n, lambda group: cases.every_dtype_and_size(group, operation))


@pytest.mark.parametrize("case", cases.SEVERAL)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_several(n: int, case: str) -> None:
    run_threads(n, cases.SEVERAL[case])


@pytest.mark.parametrize("case", refusals.DISAGREEMENTS)
@pytest.mark.parametrize("n", [2, 3])
def test_disagreement(n: int, case: str) -> None:
    run_threads(n, lambda group: refusals.disagreement(group, case))


@pytest.mark.parametrize("case", refusals.ABSENT)
def test_absent(case: str) -> None:
    run_threads(3, refusals.ABSENT[case])


def naive_1f1b(group: Group) -> None:
    """Stage 0 blocks in the send of F1's output, stage 1 in the send of B0's gradient."""
    x = torch.ones(4)
    if group.rank == 0:
        group.send(x, 1).wait()  # F0
        group.send(x, 1).wait()  # F1
        group.recv(x, 1).wait()  # B0
    else:
        group.recv(x, 0).wait()  # F0
        group.send(x, 0).wait()  # B0
        group.recv(x, 0).wait()  # F1


def test_deadlock_is_found_at_once() -> None:
    begin = time.monotonic()
    with pytest.raises(DeadlockError) as caught:
        run_threads(2, naive_1f1b)
    assert time.monotonic() - begin < 2.0
    assert "rank 0: send to rank 1: transfer float32[4] #1" in str(caught.value)
    assert "rank 1: send to rank 0: transfer float32[4] #0" in str(caught.value)


def test_deadlock_on_every_rank_and_with_finished_ranks() -> None:
    seen: list[str] = []

    def body(group: Group) -> None:
        if group.rank == 2:
            return
        with pytest.raises(DeadlockError) as caught:
            group.barrier().wait()
        seen.append(str(caught.value))
        with pytest.raises(GroupError):
            group.barrier()

    run_threads(3, body)
    assert len(seen) == 2 and seen[0] == seen[1]
    assert "rank 2: has finished" in seen[0] and "not started by rank 2" in seen[0]


def test_deadlock_across_groups() -> None:
    """Each group's order agrees on its ranks; the cycle runs across two groups."""

    def body(group: Group) -> None:
        a, b = group.split([[0, 1]], "a"), group.split([[0, 1]], "b")
        for g in (a, b) if group.rank == 0 else (b, a):
            g.barrier().wait()

    with pytest.raises(DeadlockError, match=r"rank 0: barrier #0 on group 'a'[\s\S]*rank 1: barrier #0 on group 'b'"):
        run_threads(2, body)


@pytest.mark.parametrize("lanes", ["independent", "fifo"])
def test_lanes(lanes: str) -> None:
    """Both ranks post a send, then a receive: fine if independent, a deadlock on one lane per rank."""

    def body(group: Group) -> None:
        out, back = torch.full((3,), float(group.rank)), torch.empty(3)
        works = [group.send(out, 1 - group.rank), group.recv(back, 1 - group.rank)]
        for work in works:
            work.wait()
        assert back.tolist() == [1.0 - group.rank] * 3

    if lanes == "independent":
        run_threads(2, body)
    else:
        with pytest.raises(DeadlockError, match="send to rank 1: transfer"):
            run_threads(2, body, lanes="fifo")


def test_fifo_queue_is_named_and_moves_on() -> None:
    def body(group: Group) -> None:
        assert group.lanes == "fifo"
        x, y = torch.ones(2), torch.ones(3)
        first, second = group.all_reduce(x), group.all_reduce(y)
        second.wait()
        assert first.done() and x.tolist() == [2.0] * 2 and y.tolist() == [2.0] * 3
        if group.rank == 0:
            group.recv(x, 1)
            group.barrier().wait()

    with pytest.raises(DeadlockError, match=r"rank 0: barrier #2.*queued in its FIFO lane behind recv from rank 1"):
        run_threads(2, body, lanes="fifo")


def test_failing_rank_ends_the_others() -> None:
    errors: list[GroupError] = []

    def body(group: Group) -> None:
        if group.rank == 1:
            raise ValueError("rank one is ill")
        try:
            group.barrier().wait()
        except GroupError as error:
            errors.append(error)
            raise

    begin = time.monotonic()
    with pytest.raises(ValueError, match="ill") as caught:
        run_threads(3, body)
    assert time.monotonic() - begin < 2.0
    assert "(raised on rank 1 of 3)" in caught.value.__notes__
    assert len(errors) == 2 and all("rank 1 failed: ValueError: rank one is ill" in str(e) for e in errors)


def test_ranks_that_never_return() -> None:
    stop = time.monotonic() + 1.0

    def body(group: Group) -> None:
        while group.rank == 1 and time.monotonic() < stop:
            time.sleep(0.01)

    with pytest.raises(DeadlineError, match=r"rank 1 of 2 still running after 0.2 s[\s\S]*in body"):
        run_threads(2, body, deadline=0.2)


def test_results_in_rank_order() -> None:
    def body(group: Group) -> int:
        time.sleep(0.02 * (3 - group.rank))
        return group.rank

    assert run_threads(3, body) == [0, 1, 2]


def test_no_version_is_counted() -> None:
    """Like MPI, an operation writes memory behind autograd's back: what it saved stays usable."""

    def body(group: Group) -> None:
        x = torch.ones(3)
        before = x._version
        group.all_reduce(x).wait()
        assert x._version == before

    run_threads(2, body)


def test_mesh_groups() -> None:
    mesh = make_mesh(8, dp=2, pp=2, tp=2)

    def body(world: Group) -> None:
        groups = mesh_groups(world, mesh)
        coords = mesh.coords(world.rank)
        for axes in (("dp",), ("pp",), ("tp",), ("dp", "tp"), ("tp", "dp"), ("pp", "tp"), ("dp", "pp")):
            group = groups.over(*axes)
            assert group.members == mesh.peers(world.rank, *axes)
            got = torch.empty(group.size, dtype=torch.int64)
            group.all_gather(got, torch.tensor([world.rank])).wait()
            assert tuple(got.tolist()) == group.members
        assert groups.over("dp", "pp", "tp") is world
        pp, peer = groups.link(1 - coords["pp"], "send")
        assert pp is groups.axis("pp") and pp.members[peer] == mesh.rank(coords | {"pp": 1 - coords["pp"]})
        with pytest.raises(MeshError, match="has no link"):
            groups.link(coords["pp"], "send")
        groups.close()

    run_threads(8, body)


def test_mesh_groups_of_thin_meshes() -> None:
    def body(world: Group) -> None:
        groups = mesh_groups(world, make_mesh(2, dp=2))
        assert groups.axis("dp") is world and groups.over("dp", "tp") is world
        assert isinstance(groups.axis("tp"), Solo) and isinstance(groups.over("pp", "tp"), Solo)
        with pytest.raises(MeshError, match="has 4 ranks, the group 'world' has 2"):
            mesh_groups(world, make_mesh(4))
        with pytest.raises(MismatchError, match="disagree on the mesh"):
            mesh_groups(world, make_mesh(2, pp=1 + world.rank))

    run_threads(2, body)
    groups = mesh_groups(Solo(), make_mesh(1))
    assert groups.axis("dp").size == groups.over("dp", "tp").size == 1
    with pytest.raises(MeshError, match=r"no group over dp\+pp was made"):
        run_threads(8, lambda w: mesh_groups(w, make_mesh(8, dp=2, pp=2, tp=2), [("dp",)]).over("dp", "pp"))
