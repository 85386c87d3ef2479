"""What a group of two processes must do while nobody waits, out of order and when it is closed; of one rank's group."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from triloom.errors import DeadlineError, GroupError
from triloom.groups.base import Group


def transfer_against_collective(group: Group) -> None:
    """Two kinds of operation have no header in common; the deadline tells what the other rank is at."""
    sub = group.split([[0, 1]], "kinds")
    work = sub.recv(torch.ones(5), 0) if sub.rank else sub.all_reduce(torch.ones(7))
    if sub.rank == 0:
        instead = r"rank 1 had not arrived; rank 1 is at recv from rank 0: transfer float32\[5\] #0"
    else:
        instead = r"rank 0 had not arrived; rank 0 is at all_reduce float32\[7\] sum #0"
    with pytest.raises(DeadlineError, match=instead):
        work.wait(0.3)
    group.barrier().wait(20)


def progress_without_waiting(group: Group) -> None:
    """A large all_reduce, many exchanges and sums long, completes while this thread multiplies matrices."""
    x = torch.full((4 << 20,), 1.0 + group.rank)
    a = torch.randn(256, 256)
    group.barrier().wait()
    work: Any = group.all_reduce(x)
    end = time.monotonic() + 20
    while not work.over and time.monotonic() < end:  # `over` only looks; done() would drive
        torch.mm(a, a)
    assert work.over
    assert x[0] == x[-1] == 3.0
    work.wait()


def operations_overtake(group: Group) -> None:
    """The second operation completes while the first still misses a rank."""
    sub = group.split([[0, 1]], "overtaking")
    x, y = torch.ones(100_000), torch.ones(5)
    if sub.rank == 0:
        late = sub.send(x, 1)
        sub.all_reduce(y).wait()
        assert not late.done()
    else:
        sub.all_reduce(y).wait()
        time.sleep(0.05)
        late = sub.recv(x, 0)
    late.wait()
    sub.close()


def close_abandons_what_is_outstanding(group: Group) -> None:
    sub = group.split([[0, 1]], "closing")
    x = torch.zeros(8)
    works = [sub.recv(x, 1)] if sub.rank == 0 else []
    sub.close()
    for work in works:
        with pytest.raises(GroupError, match=r"recv from rank 1: transfer float32\[8\] #0 .*was abandoned"):
            work.wait()
    with pytest.raises(GroupError, match="the group is closed"):
        sub.barrier()
    sub.close()
    group.barrier().wait(20)


PAIRS: dict[str, Callable[[Group], None]] = {
    f.__name__: f
    for f in (
        transfer_against_collective,
        progress_without_waiting,
        operations_overtake,
        close_abandons_what_is_outstanding,
    )
}
BLIND = tuple(name for name in PAIRS if name != "transfer_against_collective")
"""Those for a transport that cannot look at a message that nobody receives."""
