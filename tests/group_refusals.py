"""What every Group must refuse, as functions of one rank's group: operations that differ, ranks that do not come."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from triloom.errors import DeadlineError, GroupError, MismatchError
from triloom.groups.base import Group, Work

# -- disagreement ------------------------------------------------------------------------------------
# Each case issues operations on which one rank (the last) differs, and returns the works and the
# tensors that must not have changed. A rank whose own arguments do not fit raises when it issues.


def wrong_length(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(9 if odd else 8))]


def wrong_length_large(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(8 if odd else 100_000))]


def wrong_dtype(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(8, torch.int64 if odd else torch.float64))]


def wrong_operation(group: Group, odd: bool) -> list[Work]:
    x = _ones(8)
    return [group.broadcast(x) if odd else group.all_reduce(x)]


def wrong_reduction(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(8), "max" if odd else "sum")]


def wrong_root(group: Group, odd: bool) -> list[Work]:
    return [group.broadcast(_ones(8), 1 if odd else 0)]


def root_outside(group: Group, odd: bool) -> list[Work]:
    return [group.broadcast(_ones(8), group.size if odd else 0)]


def wrong_order(group: Group, odd: bool) -> list[Work]:
    first, second = _ones(8), _ones(16)
    a, b = (second, first) if odd else (first, second)
    return [group.all_reduce(a), group.all_reduce(b)]


def wrong_output(group: Group, odd: bool) -> list[Work]:
    return [group.all_gather(_ones(8 * group.size + odd), _ones(8))]


def not_contiguous(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(16)[::2] if odd else _ones(8))]


def unsupported_dtype(group: Group, odd: bool) -> list[Work]:
    return [group.all_reduce(_ones(8, torch.int32 if odd else torch.int64))]


def barrier_against_data(group: Group, odd: bool) -> list[Work]:
    return [group.barrier() if odd else group.all_reduce(_ones(0))]


def wrong_transfer(group: Group, odd: bool, numel: int = 8, dtype: torch.dtype = torch.float32) -> list[Work]:
    """The last rank receives something else than rank 0 sends; other ranks have no part in it."""
    if odd:
        return [group.recv(_ones(numel, dtype), 0)]
    return [group.send(_ones(9), group.size - 1)] if group.rank == 0 else []


def wrong_transfer_large(group: Group, odd: bool) -> list[Work]:
    return wrong_transfer(group, odd, numel=100_000)


def wrong_transfer_dtype(group: Group, odd: bool) -> list[Work]:
    return wrong_transfer(group, odd, numel=9, dtype=torch.int64)


def refused_transfer(group: Group, odd: bool) -> list[Work]:
    if odd:
        return [group.recv(_ones(18)[::2], 0)]
    return [group.send(_ones(100_000), group.size - 1)] if group.rank == 0 else []


def _ones(numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(numel, dtype=dtype)


DISAGREEMENTS: dict[str, Callable[[Group, bool], list[Work]]] = {
    f.__name__: f
    for f in (
        wrong_length,
        wrong_length_large,
        wrong_dtype,
        wrong_operation,
        wrong_reduction,
        wrong_root,
        root_outside,
        wrong_order,
        wrong_output,
        not_contiguous,
        unsupported_dtype,
        barrier_against_data,
        wrong_transfer,
        wrong_transfer_large,
        wrong_transfer_dtype,
        refused_transfer,
    )
}
REFUSED_AT_ONCE = ("root_outside", "wrong_output", "not_contiguous", "unsupported_dtype", "refused_transfer")


def disagreement(group: Group, case: str) -> None:
    """Every participant raises, naming both sides, before any buffer changed; the group still works after it."""
    odd = group.rank == group.size - 1
    watched = _Watched(group)
    if odd and case in REFUSED_AT_ONCE:
        with pytest.raises(MismatchError, match=f"rank {group.rank}"):
            DISAGREEMENTS[case](watched, odd)
    else:
        works = DISAGREEMENTS[case](watched, odd)
        for work in works:
            with pytest.raises(MismatchError, match=rf"rank.? 0.*: .*rank {group.size - 1}: .*No buffer was changed"):
                work.wait(20)
    watched.check_unchanged()
    x = torch.full((3,), float(group.rank))
    group.all_reduce(x, "max").wait(20)
    assert x.tolist() == [group.size - 1.0] * 3


class _Watched:
    """A group that remembers the tensors it is given and what they held."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __getattr__(self, name: str) -> object:
        attribute = getattr(self._group, name)
        if not callable(attribute):
            return attribute

        def call(*args: object) -> object:
            self._seen += [(a, a.clone()) for a in args if isinstance(a, torch.Tensor)]
            return attribute(*args)

        return call

    def check_unchanged(self) -> None:
        for tensor, before in self._seen:
            assert torch.equal(tensor, before)


# -- ranks that do not come --------------------------------------------------------------------------


def absent_rank(group: Group) -> None:
    """The last rank does not take part: the deadline names it and everything else, and the group is done for."""
    sub = group.split([list(range(group.size))], "late")
    absent = group.size - 1
    if group.rank == absent:
        time.sleep(0.8)  # waiting in an operation of another group would be a deadlock, found at once by Threads
    else:
        work = sub.all_reduce(torch.ones(1000))
        begin = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            work.wait(0.3)
        assert 0.2 < time.monotonic() - begin < 0.75
        for word in ("all_reduce float32[1000] sum #0", "'late'", f"rank {absent}"):
            assert word in str(caught.value)
        others = [r for r in range(group.size) if r not in (absent, group.rank)]
        assert not any(f"rank {r}" in str(caught.value) for r in others)
        with pytest.raises(GroupError, match=r"an earlier operation failed.*all_reduce"):
            sub.barrier()
    group.barrier().wait(20)


def absent_peer(group: Group) -> None:
    """A receive whose sender does not come, and a send whose receiver does not."""
    sub = group.split([list(range(group.size))], "pair")
    if group.rank < 2:
        works = [sub.recv(torch.ones(5), 1 - group.rank)] if group.rank == 0 else []
        for work in works:
            with pytest.raises(DeadlineError, match=r"recv.*rank 1.*float32\[5\] #0.*'pair'"):
                work.wait(0.3)
    if group.rank:
        time.sleep(0.8)
    group.barrier().wait(20)


ABSENT: dict[str, Callable[[Group], None]] = {f.__name__: f for f in (absent_rank, absent_peer)}


def all_of_them(group: Group) -> None:
    """Every case of this file in turn."""
    for name in DISAGREEMENTS:
        disagreement(group, name)
    for case in ABSENT.values():
        case(group)
