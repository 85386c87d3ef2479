"""NCCL groups whose ranks do not come, whose library fails, or whose ranks issue different operations."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from nccl_fake import Fake
from triloom.errors import DeadlineError, GroupError, MismatchError
from triloom.groups.base import Group
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_sequence import RECENT, agree_program
from triloom.groups.nccl_work import NCCLWork
from triloom.groups.threads import run_threads


def given_up(group: NCCLGroup) -> None:
    """Wait until the watchdog has ended the group."""
    end = time.monotonic() + 20
    while not group.row().given_up:
        assert time.monotonic() < end
        time.sleep(0.01)


# -- ranks that do not come --------------------------------------------------------------------------


def test_the_groups_own_deadline(fake: Fake) -> None:
    """Nobody waits with a deadline, nobody even asks: the watchdog still ends it, and the next call says so."""

    def body(group: NCCLGroup) -> None:
        group.deadline = 0.2
        group.all_reduce(torch.ones(2)).wait()
        if group.rank != 2:
            work = group.reduce_scatter(torch.empty(2), torch.ones(6))
            assert isinstance(work, NCCLWork)
            given_up(group)
            with pytest.raises(DeadlineError) as caught:
                work.synchronize()
            for word in (
                f"rank {group.rank}: reduce_scatter float32[6] sum #1 on group 'world'",
                "rank 2 had not arrived; the communicator was aborted",
            ):
                assert word in str(caught.value)
        else:
            given_up(group)
        with pytest.raises(GroupError, match="an earlier operation failed|gave up the group"):
            group.barrier()
        with pytest.raises(GroupError, match="earlier operation failed"):
            group.check()

    fake.run(3, body)


def test_what_is_queued_behind_a_stuck_operation(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank == 0:
            works = [group.all_reduce(torch.ones(2)), group.all_gather(torch.empty(4), torch.ones(2))]
            with pytest.raises(
                DeadlineError, match=r"all_gather.*#1.*\(queued behind all_reduce.*#0\).*rank 1 had not"
            ):
                works[1].wait(0.1)
            with pytest.raises(GroupError, match=r"all_reduce.*an earlier operation failed"):
                works[0].wait()
        group.control.barrier().wait()

    fake.run(2, body)


def test_the_other_ranks_hear_of_it(fake: Fake) -> None:
    """Rank 0 gives up early; rank 1, with ten minutes to go, hears of it within a beat, and rank 2 when it comes."""
    heard = threading.Event()

    def body(group: NCCLGroup) -> None:
        group.deadline = 600.0
        begin = time.monotonic()
        if group.rank == 2:
            assert heard.wait(20)
            given_up(group)
            with pytest.raises(GroupError, match="earlier operation failed: .*gave up the group waiting for rank 2"):
                group.all_reduce(torch.ones(2))
        else:
            with pytest.raises(DeadlineError, match="rank 2 had not arrived"):
                group.all_reduce(torch.ones(2)).wait(0.4 if group.rank == 0 else None)
            assert time.monotonic() - begin < 10
            if group.rank == 1:
                heard.set()

    fake.run(3, body)


def test_a_rank_whose_watchdog_is_silent_is_named(fake: Fake) -> None:
    """A frozen or dead process says nothing at all."""
    silent, over = threading.Event(), threading.Event()

    def body(group: NCCLGroup) -> None:
        group.control.barrier().wait()
        if group.rank == 1:
            group.watchdog.stop()  # as if the process had stopped; it waits in no operation either
            silent.set()
            assert over.wait(20)
        else:
            assert silent.wait(20)
            with pytest.raises(DeadlineError, match=r"all_reduce float32\[2\] sum #0.*world-watchdog.*rank 1"):
                group.all_reduce(torch.ones(2)).wait(0.1)
            over.set()

    fake.run(2, body)


def test_a_send_without_its_receive(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank == 0:
            with pytest.raises(
                DeadlineError, match=r"send to rank 1: transfer float32\[2\] #0.*rank 1 had not arrived"
            ):
                group.send(torch.ones(2), 1).wait(0.1)

        group.control.barrier().wait()

    fake.run(2, body)


def test_two_sends_that_cross_on_one_lane(fake: Fake) -> None:
    """All have arrived, and still nothing moves: the message must not blame a rank."""

    def body(group: NCCLGroup) -> None:
        group.control.barrier().wait()
        works = [group.send(torch.ones(2), 1 - group.rank), group.recv(torch.ones(2), 1 - group.rank)]
        group.control.barrier().wait()
        with pytest.raises(
            DeadlineError, match="send to rank .*all ranks had arrived: a device or a connection is stuck"
        ):
            works[0].wait(0.1)

    fake.run(2, body)


# -- errors that NCCL finds --------------------------------------------------------------------------


def test_an_asynchronous_error(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        group.all_reduce(torch.ones(2)).wait()
        group.control.barrier().wait()
        fake.break_comm(group.comm._slot.value, 6)
        given_up(group)
        with pytest.raises(GroupError, match="earlier operation failed: .*(result 6, scripted error|gave up)"):
            group.all_reduce(torch.ones(2))

    fake.run(2, body)
    assert fake.called().count("CommAbort") == 2


def test_a_state_that_nccl_cannot_tell(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        fake.script("ncclCommGetAsyncError", 3)
        given_up(group)
        with pytest.raises(GroupError, match="at nothing under way: ncclCommGetAsyncError failed: result 3"):
            group.all_reduce(torch.ones(2))

    fake.run(1, body)


def test_a_call_that_fails(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        fake.script("ncclAllReduce", 4)
        with pytest.raises(
            GroupError, match=r"rank 0: all_reduce float32\[2\] sum #0 on group 'world': ncclAllReduce failed"
        ):
            group.all_reduce(torch.ones(2))
        with pytest.raises(GroupError, match="an earlier operation failed: rank 0: all_reduce"):
            group.barrier()

    fake.run(1, body)
    assert fake.called()[-1] == "CommAbort"


# -- what the ranks agree on -------------------------------------------------------------------------


def test_check_names_the_first_difference(fake: Fake) -> None:
    """Even where NCCL would not notice: a sum on one rank, a maximum on the other."""

    def body(group: NCCLGroup) -> None:
        for i in range(5):
            group.all_reduce(torch.ones(3), "max" if (group.rank, i) == (1, 3) else "sum").wait()
        with pytest.raises(MismatchError) as caught:
            group.check()
        for word in (
            "rank 0: all_reduce float32[3] sum #3",
            "rank 1: all_reduce float32[3] max #3",
            "(5, 5 collectives)",
        ):
            assert word in str(caught.value)

    fake.run(2, body)


def test_check_names_a_rank_that_left_one_out(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        group.check()
        group.all_reduce(torch.ones(3)).wait()
        if group.rank == 0:
            group.all_reduce(torch.empty(0))
        with pytest.raises(
            MismatchError, match=r"rank 0: all_reduce float32\[0\] sum #1; rank 1: nothing there \(#1\)"
        ):
            group.check()

    fake.run(2, body)


def test_check_too_late(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        for i in range(RECENT + 2):
            group.all_reduce(torch.empty(0), "max" if i == group.rank else "sum")
        with pytest.raises(MismatchError, match=f"more than {RECENT} collectives ago .*more often"):
            group.check()

    fake.run(2, body)


def test_check_of_transfers(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        if group.rank < 2:
            x = torch.ones(3 + group.rank)
            (group.send(x, 1) if group.rank == 0 else group.recv(x, 0)).wait()
        with pytest.raises(
            MismatchError, match="rank 0 sent 1 times to rank 1, which received 1 times.*dtype or length"
        ):
            group.check()

    fake.run(3, body)


def test_groups_of_one_name_have_their_own_sequences(fake: Fake) -> None:
    def body(group: NCCLGroup) -> None:
        one, two = (group.split([[0, 1]], "twin") for _ in range(2))
        assert isinstance(one, NCCLGroup) and isinstance(two, NCCLGroup)
        assert one.issued.id != two.issued.id
        one.all_reduce(torch.ones(2)).wait()
        for g in (one, two, group):
            g.check()
        one.close()
        two.close()

    fake.run(2, body)


def test_agree_program() -> None:
    def body(group: Group) -> None:
        agree_program(group, "F0 B0")
        with pytest.raises(MismatchError, match="disagree on the program"):
            agree_program(group, f"F{group.rank}")

    run_threads(2, body)
