"""The NCCL group over a stand-in library (fake_nccl.c): the shared cases, sums, streams, graphs, making and closing."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
import torch

import group_cases as cases
import group_refusals as refusals
from group_cases import draw, in_order, same
from nccl_fake import Fake, FakeStreams
from triloom.errors import ConfigError, GroupError, MismatchError
from triloom.groups.base import Group, Transfer
from triloom.groups.nccl_comm import CommConfig
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_work import NCCLWork
from triloom.groups.nccl_world import nccl_group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.together import SetupError


def streams_of(group: NCCLGroup) -> FakeStreams:
    assert isinstance(group.streams, FakeStreams)
    return group.streams


def work_of(work: Any) -> NCCLWork:
    assert isinstance(work, NCCLWork)
    return work


# -- the shared cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", cases.OPERATIONS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_operations(fake: Fake, n: int, operation: str) -> None:
    """With exact=True the bits are the host groups', though the stand-in sums from the last rank to the first."""
    fake.run(n, lambda group: cases.every_dtype_and_size(group, operation), exact=True)


@pytest.mark.parametrize("case", [name for name in cases.SEVERAL if name != "objects"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_several(fake: Fake, n: int, case: str) -> None:
    fake.run(n, cases.SEVERAL[case], exact=True)


@pytest.mark.parametrize("case", refusals.ABSENT)
def test_absent(fake: Fake, case: str) -> None:
    fake.run(3, refusals.ABSENT[case])


@pytest.mark.parametrize("case", refusals.REFUSED_AT_ONCE)
def test_refused_at_once_on_the_rank_that_is_wrong(fake: Fake, case: str) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank == 1:
            with pytest.raises(MismatchError, match="rank 1: .* on group 'world': "):
                refusals.DISAGREEMENTS[case](group, True)

    fake.run(2, body)


# -- sums of 16-bit floats ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sums", ["upcast", "ordered", "native"])
def test_sums(fake: Fake, sums: str, dtype: torch.dtype) -> None:
    """Each way rounds where it says: upcast once, in the library's order; native at every rank; ordered as the host."""
    n, numel = 4, 999
    inputs = [draw(r, dtype, n * numel) for r in range(n)]
    for x, value in zip(inputs, (2.0**15, 2.0**-9, 2.0**-9, -(2.0**15)), strict=True):
        x[numel // 2] = value  # 0 or 2**-8, as fp32 adds from one end or the other
    backwards = [x.float() for x in reversed(inputs)]
    wide = backwards[0] + backwards[1] + backwards[2] + backwards[3]
    each = inputs[3] + inputs[2] + inputs[1] + inputs[0]
    want = {"upcast": wide.to(dtype), "ordered": in_order(inputs, "sum"), "native": each}
    assert len({w.view(torch.int16).numpy().tobytes() for w in want.values()}) == 3

    def body(group: NCCLGroup) -> None:
        whole = inputs[group.rank].clone()
        group.all_reduce(whole).wait()
        same(whole, want[sums])
        part = torch.empty(numel, dtype=dtype)
        group.reduce_scatter(part, inputs[group.rank].clone()).wait()
        same(part, want[sums][group.rank * numel : (group.rank + 1) * numel])

    fake.run(n, body, sums=sums)


def test_two_ranks_need_one_rounding(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        inputs = [draw(r, torch.bfloat16, 1001) for r in range(2)]
        mine = inputs[group.rank].clone()
        group.all_reduce(mine).wait()
        same(mine, in_order(inputs, "sum"))

    fake.run(2, body, sums="ordered")
    assert "AllReduce" in fake.called() and "Send" not in fake.called()


def test_exact_max_keeps_nan(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        x = torch.tensor([float("nan") if group.rank == 0 else 1.0, float(group.rank)])
        group.all_reduce(x, "max").wait()
        assert x[0].isnan() and x[1] == 2.0

    fake.run(3, body, exact=True)


# -- calls and streams -------------------------------------------------------------------------------


def test_nothing_is_called_for_nothing(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        before = len(fake.called())
        empty = torch.empty(0)
        works = [group.all_reduce(empty), group.all_gather(empty, empty), group.batch([])]
        if group.rank < 2:
            peer = 1 - group.rank
            works += [group.batch([Transfer("send", empty, peer), Transfer("recv", empty, peer)])]
        for work in works:
            work.wait()
            assert work.done()
        group.check()
        assert fake.called()[before:] == []
        group.control.barrier().wait()  # closing calls the library again

    fake.run(3, body)


def test_a_batch_is_one_nccl_group(fake: Fake) -> None:
    """And it crosses, which single transfers on one FIFO lane do not."""

    def body(group: NCCLGroup) -> None:
        peer = 1 - group.rank
        out, back = [torch.full((3,), 10.0 * group.rank + i) for i in range(2)], torch.empty(2, 3)
        moves = [Transfer("send", x, peer) for x in out] + [Transfer("recv", x, peer) for x in back]
        work = work_of(group.batch(moves))
        work.wait()
        assert back.tolist() == [[10.0 * peer + i] * 3 for i in range(2)]
        assert re.search(rf"send to rank {peer}: transfer float32\[3\] #1.*recv from rank {peer}", work.text)

    fake.run(2, body)
    calls = fake.called()
    assert calls.count("GroupStart") == calls.count("GroupEnd") == 2 and calls.count("Send") == 4


def test_waiting_orders_and_keeps_no_memory(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        streams = streams_of(group)
        work = work_of(group.all_reduce(torch.ones(4, dtype=torch.bfloat16)))
        assert len(work.keep) == 3  # in and out are one tensor, and the wide one
        before = streams.orders
        work.wait()
        assert streams.orders == before + 1 and work.keep == ()
        work.wait()
        assert work.done()

    fake.run(3, body)


def test_work_that_nobody_waits_for_keeps_its_tensors_until_it_is_over(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank == 0:
            work = work_of(group.all_reduce(torch.ones(4)))
            time.sleep(0.2)
            assert work.keep
        group.control.barrier().wait()
        if group.rank == 1:
            work = work_of(group.all_reduce(torch.ones(4)))
        until = time.monotonic() + 5
        while work.keep and time.monotonic() < until:
            time.sleep(0.01)
        assert not work.keep

    fake.run(2, body)


def test_a_barrier_holds_back_the_host(fake: Fake) -> None:
    arrived: list[int] = []

    def body(group: NCCLGroup) -> None:
        time.sleep(0.1 * group.rank)
        arrived.append(group.rank)
        group.barrier().wait()
        assert sorted(arrived) == [0, 1, 2]

    fake.run(3, body)


def test_a_tensor_from_elsewhere_is_refused(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        with pytest.raises(MismatchError, match="tensor is on meta, this group works on cpu; host tensors go over its"):
            group.all_reduce(torch.empty(3, device="meta"))

    fake.run(1, body)


# -- CUDA graphs -------------------------------------------------------------------------------------


def test_capture(fake: Fake) -> None:
    """While a capture runs no event is asked (FakeStreams asserts it), and work does not cross its borders."""

    def body(group: NCCLGroup) -> None:
        streams, x = streams_of(group), torch.ones(3)
        early = group.all_reduce(x)
        group.control.barrier().wait()
        while group._outstanding:  # until the watchdog has seen it end
            time.sleep(0.01)
        streams.capture = True
        with pytest.raises(GroupError, match="all_reduce.*#0.*was issued before this capture began"):
            early.wait()
        inside = group.all_reduce(x)
        assert not inside.done()
        inside.wait()
        left = group.all_reduce(x)
        time.sleep(0.15)
        streams.capture = False
        for ask in (left.done, left.wait):
            with pytest.raises(GroupError, match="#2 on group 'world' was captured into a CUDA graph"):
                ask()
        early.wait()
        barrier = group.barrier()
        barrier.wait()
        assert barrier.done()

    fake.run(2, body)


# -- making and closing ------------------------------------------------------------------------------


def test_ranks_without_a_library_stop_all(fake: Fake) -> None:
    def body(control: Group) -> None:
        with pytest.raises(SetupError, match=r"rank 1: no NCCL library was found \(given: /no/libnccl.*pip install"):
            nccl_group(control, fake.streams(), library="/no/libnccl.so.2" if control.rank else fake.nccl)

    run_threads(2, body)


def test_versions_must_agree(fake: Fake) -> None:
    fake.c.fake_version(22104)
    other = Fake(fake.path).nccl

    def body(control: Group) -> None:
        with pytest.raises(MismatchError, match="disagree on the version of NCCL: rank 0: .2.20.0.; rank 1: .2.21.4."):
            nccl_group(control, fake.streams(), library=other if control.rank else fake.nccl)

    run_threads(2, body)


def test_ranks_on_one_device_are_told(fake: Fake) -> None:
    """Only when NCCL refuses: where it is allowed to, it may work."""

    def body(control: Group) -> None:
        fake.script("ncclCommInitRankConfig", 5)
        control.barrier().wait()
        with pytest.raises(GroupError) as caught:
            nccl_group(control, FakeStreams(fake, "one GPU"), library=fake.nccl)
        assert any("ranks 0, 1 share a GPU" in note and "NCCL_HOSTID" in note for note in caught.value.__notes__)

    run_threads(2, body)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"sums": "fast"}, "sums must be one of"), ({"config": CommConfig(max_ctas=0)}, "max_ctas must be 1 or more")],
)
def test_bad_options(fake: Fake, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        nccl_group(Solo(), fake.streams(), library=fake.nccl, **options)


def test_close(fake: Fake) -> None:
    threads = threading.active_count()

    def body(group: NCCLGroup) -> NCCLGroup:
        group.warm()
        group.warm([(0, 1)])
        group.check()
        return group

    groups = fake.run(2, body)
    assert fake.called().count("CommDestroy") == 2 and "CommAbort" not in fake.called()
    assert threading.active_count() <= threads + 2  # the stand-in's two streams are no Python threads
    for group in groups:
        group.close()
        with pytest.raises(GroupError, match="the group is closed"):
            group.all_reduce(torch.ones(2))


def test_close_with_work_outstanding_aborts(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank == 0:
            group.all_reduce(torch.ones(2))

    fake.run(2, body)
    assert fake.called().count("CommAbort") == 1 and fake.called().count("CommDestroy") == 1
