"""What every Group must do, as functions of one rank's group; run on Solo, Threads and MPI."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from triloom.errors import DeadlineError, GroupError, MismatchError
from triloom.groups.base import DTYPES, REDUCE_OPS, Group, ReduceOp, Transfer, Work
from triloom.groups.objects import agree, broadcast_object, gather_objects
from triloom.groups.solo import Solo

SIZES = (0, 1, 3, 7, 64, 1001, 4096, 20_011)
"""Per-rank lengths on both sides of what travels with a header (16 to 64 KiB here) and off every alignment."""
LARGE = 600_011
"""Several segments of a reduction, for 2 ranks, the last one short."""


def draw(rank: int, dtype: torch.dtype, numel: int, salt: int = 0, offset: int = 1) -> torch.Tensor:
    """A rank's input, which every rank can compute; starts ``offset`` elements into its storage."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    wide = torch.randn(numel + offset, generator=generator, dtype=torch.float64) * 100
    return wide.to(dtype)[offset:]


def in_order(parts: list[torch.Tensor], op: str) -> torch.Tensor:
    """The reduction in rank order, in numpy: fp32 for 16-bit floats, one rounding."""
    dtype = parts[0].dtype
    half = dtype in (torch.bfloat16, torch.float16)
    arrays = [(p.float() if half else p).numpy() for p in parts]
    combine = {"sum": np.add, "max": np.maximum, "min": np.minimum}[op]
    acc = arrays[0]
    for array in arrays[1:]:
        acc = combine(acc, array)
    return torch.from_numpy(np.array(acc)).to(dtype)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Bitwise equality."""
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (
        got.numpy(force=True).tobytes() == want.numpy(force=True).tobytes()
        if got.dtype != torch.bfloat16
        else (got.view(torch.int16).equal(want.view(torch.int16)))
    )


# -- collectives against numpy -----------------------------------------------------------------------


def all_reduce(group: Group, dtype: torch.dtype, numel: int) -> None:
    inputs = [draw(r, dtype, numel) for r in range(group.size)]
    for op in _reductions(numel):
        mine = inputs[group.rank].clone()  # aligned
        group.all_reduce(mine, op).wait()
        same(mine, in_order(inputs, op))
    mine = inputs[group.rank]  # not aligned
    want = in_order([x.clone() for x in inputs], "sum")
    group.all_reduce(mine).wait()
    same(mine, want)


def reduce_scatter(group: Group, dtype: torch.dtype, numel: int) -> None:
    inputs = [draw(r, dtype, numel * group.size) for r in range(group.size)]
    mine = slice(group.rank * numel, (group.rank + 1) * numel)
    for op in _reductions(numel):
        out = torch.full((numel + 3,), 7, dtype=dtype)
        group.reduce_scatter(out[3:], inputs[group.rank], op).wait()
        same(out[3:], in_order([x[mine] for x in inputs], op))
        same(out[:3], torch.full((3,), 7, dtype=dtype))
    own, into_itself = inputs[group.rank], out[3:].clone()
    group.reduce_scatter(own[mine], own, op).wait()
    same(own[mine], into_itself)


def _reductions(numel: int) -> tuple[ReduceOp, ...]:
    return REDUCE_OPS if numel < 10_000 else ("sum",)


def all_gather(group: Group, dtype: torch.dtype, numel: int) -> None:
    inputs = [draw(r, dtype, numel) for r in range(group.size)]
    out = torch.full((numel * group.size,), 7, dtype=dtype)
    group.all_gather(out, inputs[group.rank]).wait()
    same(out, torch.cat(inputs))
    into = torch.full((numel * group.size,), 7, dtype=dtype)
    own = into[group.rank * numel : (group.rank + 1) * numel]
    own.copy_(inputs[group.rank])
    group.all_gather(into, own).wait()
    same(into, out)


def broadcast(group: Group, dtype: torch.dtype, numel: int) -> None:
    for root in range(group.size):
        mine = draw(group.rank, dtype, numel, salt=root)
        group.broadcast(mine, root).wait()
        same(mine, draw(root, dtype, numel, salt=root))


def all_to_all(group: Group, dtype: torch.dtype, numel: int) -> None:
    inputs = [draw(r, dtype, numel * group.size).view(group.size, numel) for r in range(group.size)]
    out = torch.full((numel * group.size + 1,), 7, dtype=dtype)[1:]
    group.all_to_all(out, inputs[group.rank].reshape(-1)).wait()
    same(out, torch.cat([x[group.rank] for x in inputs]))


def ring(group: Group, dtype: torch.dtype, numel: int) -> None:
    """Every rank sends to the next and receives from the one before, twice, waited last first."""
    if group.size == 1:
        return
    after, before = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    got = [torch.full((numel + 1,), 7, dtype=dtype)[1:] for _ in range(2)]
    sent = [draw(group.rank, dtype, numel, salt=i) for i in range(2)]
    works = [group.batch([Transfer("send", sent[i], after), Transfer("recv", got[i], before)]) for i in range(2)]
    for work in reversed(works):
        work.wait()
    for i in range(2):
        same(got[i], draw(before, dtype, numel, salt=i))


OPERATIONS: dict[str, Callable[[Group, torch.dtype, int], None]] = {
    "all_reduce": all_reduce,
    "reduce_scatter": reduce_scatter,
    "all_gather": all_gather,
    "broadcast": broadcast,
    "all_to_all": all_to_all,
    "ring": ring,
}


def every_dtype_and_size(group: Group, operation: str) -> None:
    for dtype in DTYPES:
        for numel in SIZES:
            OPERATIONS[operation](group, dtype, numel)
    OPERATIONS[operation](group, torch.float32, LARGE if operation == "all_reduce" else LARGE // group.size)


# -- several at a time -------------------------------------------------------------------------------


def outstanding_in_reverse(group: Group) -> None:
    """Many operations of all sizes under way, waited last first."""
    checks: list[tuple[Work, torch.Tensor, torch.Tensor]] = []
    for i in range(30):
        numel = (5, 30_001, 1, 9000)[i % 4]
        inputs = [draw(r, torch.float32, numel, salt=i) for r in range(group.size)]
        if i % 3 == 0:
            want = in_order([x.clone() for x in inputs], "sum")
            checks.append((group.all_reduce(inputs[group.rank]), inputs[group.rank], want))
        elif i % 3 == 1:
            out = torch.empty(numel * group.size)
            checks.append((group.all_gather(out, inputs[group.rank]), out, torch.cat(inputs)))
        else:
            root = i % group.size
            want = inputs[root].clone()
            checks.append((group.broadcast(inputs[group.rank], root), inputs[group.rank], want))
    for work, got, want in reversed(checks):
        work.wait()
        assert work.done()
        same(got, want)


def two_groups_interleaved(group: Group) -> None:
    """Operations of a group and of a split with other neighbours, issued in turn, waited out of turn."""
    evens_and_odds = [[r for r in range(group.size) if r % 2 == k] for k in range(2)]
    sub = group.split([part[::-1] for part in evens_and_odds if part], "parity")
    works = []
    for i in range(6):
        numel = (3, 40_001)[i % 2]
        whole, half = (draw(group.rank, torch.float64, numel, salt=i + k) for k in (0, 50))
        works.append((group.all_reduce(whole), whole, i, 0, group))
        works.append((sub.all_reduce(half), half, i, 50, sub))
    for work, got, i, k, of in works[1::2] + works[::2]:
        work.wait()
        ranks = [group.members.index(m) for m in of.members]
        same(got, in_order([draw(r, torch.float64, got.numel(), salt=i + k) for r in ranks], "sum"))
    sub.close()


def splits(group: Group) -> None:
    sub = group.split([[group.size - 1]], "last")
    assert isinstance(sub, Solo) or sub.size == 1
    assert sub.members == (group.members[group.rank],)
    backwards = group.split([list(range(group.size))[::-1]], "backwards")
    assert backwards.rank == group.size - 1 - group.rank
    assert backwards.members == group.members[::-1]
    got = torch.empty(group.size, dtype=torch.int64)
    backwards.all_gather(got, torch.tensor([group.rank])).wait()
    assert got.tolist() == list(range(group.size))[::-1]
    for g in (sub, backwards):
        g.close()
    if group.size > 1:
        with pytest.raises(MismatchError, match=r"disagree on split 'x'.*rank 0"):
            group.split([[0]] if group.rank == 0 else [[1]], "x")
    with pytest.raises(GroupError, match="disjoint"):
        group.split([[0], [0]], "twice")


def objects(group: Group) -> None:
    assert gather_objects(group, {"rank": group.rank, "text": "é" * group.rank}) == [
        {"rank": r, "text": "é" * r} for r in range(group.size)
    ]
    for root in range(group.size):
        assert broadcast_object(group, [group.rank] * 5000, root) == [root] * 5000
    agree(group, "the answer", {"a": 1})
    if group.size > 1:
        with pytest.raises(MismatchError, match=r"disagree on the seed: rank 0: 0; ranks? 1.*: 7"):
            agree(group, "the seed", 7 if group.rank else 0)


def barriers(group: Group) -> None:
    """Nobody leaves before the last has come."""
    arrived = time.monotonic()
    if group.rank == group.size - 1:
        time.sleep(0.1)
        arrived = time.monotonic()
    group.barrier().wait()
    left = time.monotonic()
    last = torch.tensor([arrived], dtype=torch.float64)
    group.broadcast(last, group.size - 1).wait()
    assert left >= last.item()  # one machine, one monotonic clock


SEVERAL: dict[str, Callable[[Group], None]] = {
    f.__name__: f for f in (outstanding_in_reverse, two_groups_interleaved, splits, objects, barriers)
}


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
