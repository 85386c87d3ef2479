"""The NCCL bench over the stand-in: every side does what triloom's group does; rows, files, host cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nccl_fake import Fake
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_world import sharing_settings
from triloom.picture import Line, Text
from triloom_bench import comm_nccl as bench
from triloom_bench.comm import OPERATIONS, Buffers
from triloom_bench.comm_plot import picture
from triloom_bench.peers.cupy_nccl import CupyNccl


class CupyLike:
    """The methods of a cupy.cuda.nccl.NcclCommunicator, over triloom's binding."""

    def __init__(self, group: NCCLGroup) -> None:
        nccl, comm = group.comm.library, group.comm.handle
        self.allReduce = lambda at, to, n, dtype, op, s: nccl.all_reduce(at, to, n, dtype, op, comm, s)
        self.reduceScatter = lambda at, to, n, dtype, op, s: nccl.reduce_scatter(at, to, n, dtype, op, comm, s)
        self.allGather = lambda at, to, n, dtype, s: nccl.all_gather(at, to, n, dtype, comm, s)
        self.broadcast = lambda at, to, n, dtype, root, s: nccl.broadcast(at, to, n, dtype, root, comm, s)
        self.send = lambda at, n, dtype, peer, s: nccl.send(at, n, dtype, peer, comm, s)
        self.recv = lambda at, n, dtype, peer, s: nccl.recv(at, n, dtype, peer, comm, s)


def sides(group: NCCLGroup, finish: Any) -> bench.Bench:
    nccl = group.comm.library
    address = group.streams.address
    theirs = CupyNccl(CupyLike(group), group.rank, group.size, nccl.group_start, nccl.group_end, lambda: address)
    both = {bench.OURS: bench.ours(group), bench.CUPY: bench.cupys(theirs)}
    return bench.Bench(group.control, torch.device("cpu"), finish, both, bench.binding(group), ("a note",))


def finisher(group: NCCLGroup) -> Any:
    return lambda: group.streams.order(group.streams.mark())


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("numel", [6, 1 << 19])
def test_all_sides_do_the_same(fake: Fake, name: str, numel: int) -> None:
    def body(group: NCCLGroup) -> None:
        it = sides(group, finisher(group))
        after = []
        for side in it.sides.values():
            gen = torch.Generator().manual_seed(group.rank)
            b = Buffers(*(torch.randn(n, generator=gen) for n in (numel, numel // 2, numel)))
            side[name](b)()
            it.finish()
            after.append(b)
        for got, want in zip(after[1].__dict__.values(), after[0].__dict__.values(), strict=True):
            assert torch.equal(got, want)
        gen = torch.Generator().manual_seed(group.rank)
        before = Buffers(*(torch.randn(n, generator=gen) for n in (numel, numel // 2, numel)))
        changed = [
            not torch.equal(x, y) for x, y in zip(before.__dict__.values(), after[0].__dict__.values(), strict=True)
        ]
        assert any(changed) or (name in ("send", "broadcast") and group.rank == 0)

    fake.run(2, body)


def test_rows_and_files(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SIZES", {8: 2, 4096: 1})

    def body(group: NCCLGroup) -> list[bench.Result]:
        return list(bench.results(sides(group, finisher(group)), list(OPERATIONS), 1 << 20, 7))

    rows = fake.run(2, body)[0]
    assert rows[0].title == "host cost of an all_reduce of 8 B, 2 ranks"
    assert set(rows[0].setup["us_a_call"]) == {bench.OURS, bench.CUPY, bench.BINDING}
    assert all(us > 0 for row in rows for us in row.setup["us_a_call"].values())
    assert [(row.setup["operation"], row.setup["bytes"]) for row in rows[1:4]] == [
        ("all_reduce", 8), ("all_reduce", 4096), ("all_reduce", 4096)
    ]  # fmt: skip
    assert len(rows) == 1 + 2 * len(OPERATIONS) + 2 and all(row.notes == ["a note"] for row in rows)
    output = bench.Output(tmp_path / "comm.json", tmp_path / "comm.svg")
    for n, row in enumerate(rows, 1):
        output.add(row)
        assert len(json.loads((tmp_path / "comm.json").read_text())) == n
    drawn = picture(output.rows)
    texts = [shape.text for shape in drawn.shapes if isinstance(shape, Text)]
    assert all(f"{name}, GB/s" in texts for name in OPERATIONS) and {bench.OURS, bench.CUPY} <= set(texts)
    assert all(0 <= v <= drawn.width for s in drawn.shapes if isinstance(s, Line) for v in (s.x1, s.x2))
    assert all(0 <= v <= drawn.height for s in drawn.shapes if isinstance(s, Line) for v in (s.y1, s.y2))
    assert (tmp_path / "comm.svg").read_text().startswith("<svg")


def test_one_rank_sends_nothing(fake: Fake) -> None:
    assert "send" not in {name for name, _, _ in bench.cases(list(OPERATIONS), 1 << 20, 1)}
    assert "send" in {name for name, _, _ in bench.cases(list(OPERATIONS), 1 << 20, 2)}

    def body(group: NCCLGroup) -> bench.Result:
        return bench.measure(sides(group, finisher(group)), "all_gather", "bf16", 64, 2, 7)

    assert fake.run(1, body)[0].setup["bytes"] == 64


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "triloom_bench.comm_nccl", "--json", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "no GPU on this machine: nothing was measured over NCCL" in ended.stdout
    assert json.loads(out.read_text()) == []


@pytest.mark.parametrize(("version", "own"), [(22809, "NCCL_HOSTID"), (23001, "NCCL_MULTI_RANK_GPU_ENABLE")])
def test_settings_of_ranks_that_share_a_gpu(version: int, own: str) -> None:
    one, two = sharing_settings(version, 0), sharing_settings(version, 1)
    assert own in one and one["NCCL_SOCKET_IFNAME"] == "lo"
    assert (one == two) == (version >= 23000)
