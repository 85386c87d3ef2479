"""Groups through shared memory: the shared cases, the same bits as messages, and what only a segment has."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch

import group_cases as cases
import group_refusals as refusals
from group_cases import draw, same
from group_pairs import PAIRS
from triloom.boot import World
from triloom.errors import ConfigError, DeadlineError, MismatchError
from triloom.groups.base import DTYPES, Group
from triloom.groups.mpi import MPIGroup
from triloom.groups.shared import SharedWork
from triloom.groups.shared_host import SharedMemory
from triloom.groups.wired import WiredGroup

COUNTS = (2, 3, 4)


@contextlib.contextmanager
def another(world: World, shared: SharedMemory | None) -> Iterator[WiredGroup]:
    """A group of all ranks with other options."""
    assert isinstance(world.group, MPIGroup)
    group = MPIGroup(world.group._wire.comm, name="another", deadline=20, shared=shared)
    yield group
    group.close()


def segment(group: Group) -> WiredGroup:
    assert isinstance(group, WiredGroup) and group._local is not None and group.transport == "shared memory"
    return group


@pytest.mark.ranks(*COUNTS)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations(world: World, operation: str) -> None:
    cases.every_dtype_and_size(segment(world.group), operation)


@pytest.mark.full
@pytest.mark.ranks(5, 6, timeout=150, launch=600)
@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_operations_of_many(world: World, operation: str) -> None:
    cases.every_dtype_and_size(segment(world.group), operation)


@pytest.mark.full
@pytest.mark.ranks(5, 6, timeout=150, launch=600)
def test_rules_of_many(world: World) -> None:
    for several in cases.SEVERAL.values():
        several(segment(world.group))
    refusals.all_of_them(world.group)


@pytest.mark.ranks(*COUNTS)
@pytest.mark.parametrize("case", cases.SEVERAL)
def test_several(world: World, case: str) -> None:
    cases.SEVERAL[case](segment(world.group))


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("case", refusals.DISAGREEMENTS)
def test_disagreement(world: World, case: str) -> None:
    refusals.disagreement(segment(world.group), case)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("case", refusals.ABSENT)
def test_absent(world: World, case: str) -> None:
    refusals.ABSENT[case](segment(world.group))


@pytest.mark.ranks(2)
@pytest.mark.parametrize("case", PAIRS)
def test_pair(world: World, case: str) -> None:
    PAIRS[case](segment(world.group))


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("limit", [64 << 20, 600_000], ids=["measured sizes", "smallest blocks"])
def test_the_same_bits_as_messages(world: World, limit: int) -> None:
    """Lengths around a block and a step of everything, off every alignment; tiny blocks go round the segment often."""
    with another(world, SharedMemory(limit_bytes=limit)) as group, another(world, None) as wired:
        segment(group)
        for dtype in DTYPES:
            for numel in (4097, 65_535, 131_073):
                mine = draw(world.rank, dtype, numel * group.size)
                for of in (group, wired):
                    x, part = mine.clone(), torch.empty(numel, dtype=dtype)
                    of.all_reduce(x).wait()
                    of.reduce_scatter(part, mine).wait()
                    if of is group:
                        whole, shard = x, part
                same(whole, x)
                same(shard, part)


@pytest.mark.ranks(3)
def test_segment_too_small(world: World) -> None:
    """Then the group sends messages, says why, and works."""
    with another(world, SharedMemory(limit_bytes=20_000)) as group:
        assert group.transport.startswith("messages (a segment of 3 ranks takes at least ")
        assert group.transport.endswith("limit_bytes=20000 allows fewer)")
        cases.all_reduce(group, torch.float32, 5000)


@pytest.mark.ranks(2)
def test_segment_that_cannot_be_made(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank cannot open it: all of them send messages."""
    if world.rank == 1:
        refuse = OSError(13, "Permission denied")

        def no(path: str, flags: int) -> int:
            raise refuse

        monkeypatch.setattr("triloom.groups.segments.os.open", no)
    with another(world, SharedMemory()) as group:
        assert "rank 1 cannot map the segment of rank 0: [Errno 13] Permission denied" in group.transport
        cases.all_reduce(group, torch.float32, 5000)


@pytest.mark.ranks(2)
def test_options_must_agree(world: World) -> None:
    for hosts, error, text in (
        ((0, world.rank), MismatchError, "pass different shared="),
        ((0,), ConfigError, r"hosts=\(0,\) names 1 ranks, the group has 2"),
    ):
        with pytest.raises(error, match=text), another(world, SharedMemory(hosts=hosts)):
            pass


INSIDE = "messages between hosts, shared memory inside"
MAPS = {
    3: ("aab", "aba", "abb"),
    4: ("aabb", "abba", "aaab", "abaa", "abcb"),
    6: ("aabbcc", "aaabbb", "ababab", "aaaabb", "abbbbb", "aabcbb", "abacba", "aabbbc"),
}
"""The host of each rank: blocks of ranks, ranks that come back to a host, and hosts with different numbers of them."""


@pytest.mark.ranks(3)
@pytest.mark.parametrize("hosts", MAPS[3])
def test_hierarchical_equals_flat_on_three(world: World, hosts: str) -> None:
    hierarchical_equals_flat(world, hosts)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("hosts", MAPS[4])
def test_hierarchical_equals_flat(world: World, hosts: str) -> None:
    """Every collective, several at a time."""
    hierarchical_equals_flat(world, hosts)


@pytest.mark.full
@pytest.mark.ranks(6)
@pytest.mark.parametrize("hosts", MAPS[6])
def test_hierarchical_equals_flat_on_many(world: World, hosts: str) -> None:
    hierarchical_equals_flat(world, hosts)


def hierarchical_equals_flat(world: World, hosts: str) -> None:
    with another(world, SharedMemory(hosts=tuple(map(ord, hosts)))) as group, another(world, None) as flat:
        assert group.transport == INSIDE and flat.transport == "messages"
        for dtype in DTYPES:
            for numel in (40_001, 9000):
                mine = draw(world.rank, dtype, numel * group.size)
                got: dict[WiredGroup, list[torch.Tensor]] = {}
                for of in (group, flat):
                    x, y, part = mine.clone(), mine.clone(), torch.empty(numel, dtype=dtype)
                    whole, other = torch.empty_like(mine), torch.empty_like(mine)
                    works = [of.all_reduce(x), of.reduce_scatter(part, mine), of.broadcast(y, 1)]
                    works += [of.all_gather(whole, mine[:numel]), of.all_to_all(other, mine)]
                    for work in reversed(works):
                        work.wait()
                    got[of] = [x, y, part, whole, other]
                for a, b in zip(got[group], got[flat], strict=True):
                    same(a, b)


@pytest.mark.ranks(4)
def test_groups_over_hosts(world: World) -> None:
    """The cases on a group over two hosts, and what its splits use."""
    with another(world, SharedMemory(hosts=(0, 0, 7, 7))) as group:
        for operation in cases.OPERATIONS.values():
            operation(group, torch.float32, 40_003)
        for case in ("outstanding_in_reverse", "two_groups_interleaved"):
            cases.SEVERAL[case](group)
        for case in refusals.DISAGREEMENTS:
            refusals.disagreement(group, case)
        inside, across = group.split([[0, 1], [2, 3]], "inside"), group.split([[0, 2], [1, 3]], "across")
        assert isinstance(across, WiredGroup) and across._local is None
        assert across.transport == "messages (its ranks are on several hosts)"
        for of in (segment(inside), across):
            cases.all_reduce(of, torch.float32, 40_001)
            cases.all_reduce(of, torch.bfloat16, 9)
        inside.close()
        across.close()


@pytest.mark.ranks(3)
def test_a_host_for_every_rank(world: World) -> None:
    with another(world, SharedMemory(hosts=(0, 1, 2))) as group:
        assert group.transport == "messages (its ranks are on several hosts)"
        cases.all_reduce(group, torch.float32, 40_001)


class LateStage:
    """Stands for the pinned copy of a GPU tensor, complete a while after issue."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.ready_at = time.monotonic() + 0.05
        self.tensor = tensor
        self.calls: list[str] = []

    def Test(self) -> bool:
        if time.monotonic() < self.ready_at:
            return False
        if not self.calls:
            self.calls.append("ready")
            self.tensor.fill_(3.0)  # only now is the input there
        return True

    def copy_back(self) -> None:
        self.calls.append("copy_back")

    def release(self) -> None:
        self.calls.append("release")

    def arrived(self) -> bool:
        return True

    def order(self) -> None:
        self.calls.append("order")


@pytest.mark.ranks(2)
@pytest.mark.parametrize("numel", [3, 200_000])
def test_input_that_is_still_on_its_way(world: World, monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    """As of a GPU tensor: issued at once, moved when it is there, driven by the progress thread, then copied back."""
    group = segment(world.group)
    x = torch.full((numel,), 4.0 if world.rank else -1.0)
    if world.rank == 0:
        stage, flat = LateStage(x), group._flat

        def staged(work: SharedWork, *rest: object) -> object:
            work.stage = stage  # type: ignore[assignment]
            return flat(work, *rest)  # type: ignore[arg-type]

        monkeypatch.setattr(group, "_flat", staged)
        begin = time.monotonic()
        work = group.all_reduce(x)
        assert time.monotonic() - begin < 0.04
        monkeypatch.undo()
        end = time.monotonic() + 20
        while "release" not in stage.calls and time.monotonic() < end:
            time.sleep(0.001)  # nobody waits
        work.wait()
        assert stage.calls == ["ready", "copy_back", "release", "order"]
    else:
        group.all_reduce(x).wait()
    assert x.eq(7.0).all()


@pytest.mark.ranks(2)
def test_idle_threads_take_no_core(world: World) -> None:
    """While an operation waits for a rank that sleeps, its process does not burn a core."""
    group = segment(world.group)
    group.barrier().wait()
    x = torch.ones(1 << 20)
    if world.rank == 0:
        work = group.all_reduce(x)
        before = time.process_time()
        time.sleep(0.3)  # the engine's thread looks after it
        assert time.process_time() - before < 0.1
        before = time.process_time()
        work.wait()
        assert time.process_time() - before < 0.1
    else:
        time.sleep(0.6)
        group.all_reduce(x).wait()
    assert x[0] == 2.0


@pytest.mark.ranks(2)
def test_data_that_does_not_come_is_told_from_a_rank_that_does_not(world: World) -> None:
    """Rank 1 announces its operation and freezes before the data."""
    group = segment(world.group.split([[0, 1]], "frozen"))
    x = torch.ones(1 << 20)
    pids = torch.tensor([0, 0])
    world.group.all_gather(pids, torch.tensor([os.getpid()])).wait()
    if world.rank == 1:
        world.group.barrier().wait()
        os.kill(os.getpid(), signal.SIGSTOP)  # until rank 0 lets it go on
        group.all_reduce(x).wait(20)
    else:
        world.group.barrier().wait()
        time.sleep(0.2)
        with pytest.raises(DeadlineError, match="rank 1 had not arrived"):
            group.all_reduce(x).wait(0.4)
        os.kill(int(pids[1]), signal.SIGCONT)
        end = time.monotonic() + 20
        while x[0] != 2.0 and time.monotonic() < end:  # this rank's thread still does its part
            time.sleep(0.01)
        assert x[0] == 2.0
    world.group.barrier().wait(20)


@pytest.mark.ranks(2)
def test_nothing_is_kept(world: World) -> None:
    """Operations waited for, or let go, leave no tensors, files or mappings behind."""
    group = segment(world.group)
    gc.collect()  # groups of cases before
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        group.all_reduce(torch.ones(4), "max").wait()
        group.all_reduce(torch.ones(4), "max")
    group.barrier().wait()
    assert group._local is not None and len(group._local._live) <= 64
    for i in range(3):
        group.split([[0, 1]], f"s{i}").close()
    gc.collect()
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= files


@pytest.mark.ranks(2)
def test_unchecked_group_gives_the_same(world: World) -> None:
    assert isinstance(world.group, MPIGroup)
    group = MPIGroup(world.group._wire.comm, name="unchecked", check=False)
    for operation in cases.OPERATIONS.values():
        for numel in (7, 40_003):
            operation(group, torch.float32, numel)
    group.close()


@pytest.mark.ranks(4)
def test_more_ranks_than_cores_do_not_crawl(world: World) -> None:
    """All ranks on one core: 200 small operations and a large one, which spinning would stretch to minutes."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with another(world, SharedMemory()) as group:
            x = torch.ones(1 << 20)
            begin = time.monotonic()
            for _ in range(200):
                group.all_reduce(x[:8], "max").wait()
            group.all_reduce(x).wait()
            assert time.monotonic() - begin < 10
            assert x[-1] == 4.0
    finally:
        os.sched_setaffinity(0, cores)
