"""What every Group must do, as functions of one rank's group; run on every kind of it (what it must refuse:
group_refusals.py; what takes ranks as processes: group_pairs.py)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from triloom.errors import GroupError, MismatchError
from triloom.groups.base import DTYPES, REDUCE_OPS, Group, ReduceOp, Transfer, Work
from triloom.groups.objects import HEAD_BYTES, agree, broadcast_object, gather_objects
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
    for length in (0, HEAD_BYTES - 3, HEAD_BYTES - 2, HEAD_BYTES - 1, HEAD_BYTES + 6, 5000):  # and two quotes
        texts = ["x" * (length if r == group.size - 1 else r) for r in range(group.size)]
        assert gather_objects(group, texts[group.rank]) == texts
        for root in range(group.size):
            assert broadcast_object(group, texts[group.rank], root) == texts[root]
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
