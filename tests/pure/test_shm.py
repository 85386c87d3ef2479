"""The shared-memory engine itself, with threads as ranks: one engine and one mapping for each in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from group_cases import draw, in_order, same
from triloom import _C
from triloom.groups.fingerprint import OPS
from triloom.groups.shared_sizes import MEASURED, Sizes, sizes_for
from triloom.native import DTYPE_CODES, REDUCE_CODES

TINY = (64, 4096, 4096)
DONE, MISMATCH = 3, 4


class Rank:
    """One end of a segment."""

    def __init__(self, rank: int, engine: _C.ShmEngine, channel: _C.ShmChannel) -> None:
        self.rank = rank
        self.engine = engine
        self.channel = channel

    def op(self, verb: str, out: torch.Tensor, inp: torch.Tensor, header: bytes = b"same", op: str = "sum") -> _C.ShmOp:
        return _C.ShmOp(
            header, OPS.index(verb), DTYPE_CODES[inp.dtype], REDUCE_CODES[op], 0, False, True,
            out.data_ptr(), inp.data_ptr(), inp.numel(),
        )  # fmt: skip

    def run(self, op: _C.ShmOp, seconds: float = 20) -> _C.ShmOp:
        assert self.engine.wait(self.channel.collective(op), seconds) == 1
        return op


@contextmanager
def ranks(n: int, sizes: tuple[int, int, int] = TINY, spin: float = 0.0, check: bool = True) -> Iterator[list[Rank]]:
    layout = (n, *sizes)
    bells, fd = os.memfd_create("bells"), os.memfd_create("segment")
    os.ftruncate(bells, _C.ShmEngine.bells_bytes(n))
    os.ftruncate(fd, _C.ShmChannel.total_bytes(layout))
    engines = [_C.ShmEngine(bells, r, [os.getpid()] * n, spin) for r in range(n)]
    ends = [Rank(r, e, _C.ShmChannel(e, fd, layout, r, list(range(n)), check)) for r, e in enumerate(engines)]
    os.close(bells)
    os.close(fd)
    yield ends
    for end in ends:
        end.channel.close()
        end.engine.stop()


def together(ends: list[Rank], body: Callable[[Rank], None]) -> None:
    """Run a body on every rank at once; the first failure is raised here."""
    failures: list[BaseException] = []

    def run(end: Rank) -> None:
        try:
            body(end)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(end,)) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_sums_in_rank_order(n: int, dtype: torch.dtype) -> None:
    """Around the inline limit, a block, a step, and many times round the segment; nothing aligned."""
    inputs = {k: [draw(r, dtype, k) for r in range(n)] for k in (1, 15, 33, 1025, 4097, 60_001)}
    wants = {(k, op): in_order(x, op) for k, x in inputs.items() for op in REDUCE_CODES}

    def body(end: Rank) -> None:
        for (k, op), want in wants.items():
            x = torch.cat([inputs[k][end.rank][:1], inputs[k][end.rank]])[1:]
            end.run(end.op("all_reduce", x, x, op=op))
            same(x, want)

    with ranks(n) as ends:
        together(ends, body)


@pytest.mark.parametrize("spin", [0.0, 3e-6])
def test_every_collective_in_turn(spin: float) -> None:
    """Kinds and sizes alternate, so that counters and blocks are handed from one kind to the next."""
    n, lengths = 3, (5, 700, 20_003)

    def body(end: Rank) -> None:
        for turn in range(6):
            for k in lengths:
                mine = [draw(r, torch.float32, n * k, salt=turn) for r in range(n)]
                whole, part, wide = mine[end.rank].clone(), torch.empty(k), torch.empty(n * n * k)
                ops = [
                    end.op("all_gather", wide, mine[end.rank]),
                    end.op("reduce_scatter", part, mine[end.rank]),
                    end.op("all_to_all", whole, mine[end.rank]),
                ]
                for op in ops:
                    end.channel.collective(op)
                for op in reversed(ops):
                    assert end.engine.wait(op, 20) == 1 and op.state == DONE
                own = slice(end.rank * k, (end.rank + 1) * k)
                same(wide, torch.cat(mine))
                same(part, in_order([x[own] for x in mine], "sum"))
                same(whole, torch.cat([x[own] for x in mine]))

    with ranks(n, spin=spin) as ends:
        together(ends, body)


def test_more_outstanding_than_rows() -> None:
    """Fifty operations before the first wait: rows are used again only when everyone has read them."""

    def body(end: Rank) -> None:
        xs = [torch.full((3,), float(end.rank + i)) for i in range(50)]
        ops = [end.channel.collective(end.op("all_reduce", x, x)) for x in xs]
        for i in reversed(range(50)):
            assert end.engine.wait(ops[i], 20) == 1
            assert xs[i].tolist() == [2.0 * i + 1] * 3

    with ranks(2) as ends:
        together(ends, body)


@pytest.mark.parametrize("k", [3, 50_001])
def test_transfers_both_ways(k: int) -> None:
    def body(end: Rank) -> None:
        peer = 1 - end.rank
        for turn in range(12):
            out, inp = torch.zeros(k), torch.full((k,), float(10 * turn + end.rank))
            send = end.channel.transfer(end.op("transfer", inp, inp), peer, True)
            recv = end.channel.transfer(end.op("transfer", out, out), peer, False)
            assert end.engine.wait(send, 20) == end.engine.wait(recv, 20) == 1
            assert out.eq(10 * turn + peer).all()

    with ranks(2) as ends:
        together(ends, body)


@pytest.mark.parametrize("k", [3, 50_001])
@pytest.mark.parametrize("check", [True, False])
def test_headers_are_compared_before_anything_changes(k: int, check: bool) -> None:
    def body(end: Rank) -> None:
        x = torch.full((k,), float(end.rank))
        op = end.run(end.op("all_reduce", x, x, header=b"one" if end.rank else b"another"))
        if not check:
            assert op.state == DONE and x.eq(3.0).all()
            return
        assert op.state == MISMATCH and x.eq(end.rank).all()
        assert [said.rstrip(b"\0") for said in op.said] == [b"another", b"one", b"one"]
        end.run(end.op("all_reduce", x, x))
        assert x.eq(3.0).all()

    with ranks(3, check=check) as ends:
        together(ends, body)


def test_who_is_late_and_what_it_is_at() -> None:
    with ranks(3) as ends:
        x, y = torch.ones(3), torch.ones(5000)
        op = ends[0].channel.collective(ends[0].op("all_reduce", x, x))
        ends[1].channel.collective(ends[1].op("all_reduce", x, x))
        ends[2].channel.transfer(ends[2].op("transfer", y, y, header=b"a send"), 0, True)
        begin = time.monotonic()
        assert ends[0].engine.wait(op, 0.15) == 0
        assert 0.1 < time.monotonic() - begin < 1.0
        assert ends[0].channel.late(op, -1, False) == [2]
        assert [(kind, text.rstrip(b"\0")) for kind, text in ends[0].channel.unexpected(2)] == [(1, b"a send")]


def test_a_process_that_ended_is_told_from_one_that_is_late() -> None:
    """Rank 1 is a process that never comes: a wait runs out while it lives, and ends at once when it has ended."""
    layout = (2, *TINY)
    bells, fd = os.memfd_create("bells"), os.memfd_create("segment")
    os.ftruncate(bells, _C.ShmEngine.bells_bytes(2))
    os.ftruncate(fd, _C.ShmChannel.total_bytes(layout))
    other = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    engine = _C.ShmEngine(bells, 0, [os.getpid(), other.pid], 0.0)
    end = Rank(0, engine, _C.ShmChannel(engine, fd, layout, 0, [0, 1], True))
    x = torch.ones(5000)
    op = end.channel.collective(end.op("all_reduce", x, x))
    assert engine.wait(op, 0.2) == 0 and engine.ended_processes() == []
    threading.Timer(0.2, other.kill).start()
    begin = time.monotonic()
    assert engine.wait(op, 30) == 2
    assert time.monotonic() - begin < 10
    assert engine.ended_processes() == [1] == end.channel.late(op, -1, False)
    assert x.eq(1).all()
    end.channel.close()
    engine.stop()
    other.wait()
    os.close(bells)
    os.close(fd)


def test_nothing_is_touched_after_close() -> None:
    with ranks(2) as ends:
        x, y = torch.zeros(60_000), torch.ones(60_000)
        op = ends[0].channel.collective(ends[0].op("all_reduce", x, x))
        ends[0].channel.close()
        ends[1].channel.collective(ends[1].op("all_reduce", y, y))
        assert ends[0].engine.wait(op, 0.05) == 0 and x.eq(0).all()
        with pytest.raises(_C.NativeError, match="closed"):
            ends[0].channel.collective(ends[0].op("all_reduce", x, x))


def test_input_not_ready() -> None:
    """An operation whose input is still on its way neither starts nor lets later ones pass."""
    with ranks(2) as ends:
        x, y = torch.ones(4), torch.ones(4)
        late = _C.ShmOp(b"same", 0, DTYPE_CODES[x.dtype], 0, -1, False, False, x.data_ptr(), x.data_ptr(), 4)
        ends[0].channel.collective(late)
        other = ends[1].channel.collective(ends[1].op("all_reduce", y, y))
        assert ends[1].engine.wait(other, 0.05) == 0 and ends[1].channel.late(other, -1, False) == [0]
        x.fill_(5.0)
        ends[0].engine.release(late)
        assert ends[1].engine.wait(other, 20) == ends[0].engine.wait(late, 20) == 1
        assert x.tolist() == y.tolist() == [6.0] * 4


def test_sizes() -> None:
    for n in (2, 3, 4, 7, 8, 64):
        sizes = sizes_for(n, 256 << 20)
        assert isinstance(sizes, Sizes) and sizes.block_bytes % 64 == 0
    assert sizes_for(2, 64 << 20) == MEASURED[2]
    small = sizes_for(2, 300_000)
    assert isinstance(small, Sizes) and small.block_bytes < MEASURED[2].block_bytes
    text = sizes_for(2, 1000)
    assert isinstance(text, str) and "limit_bytes=1000" in text
