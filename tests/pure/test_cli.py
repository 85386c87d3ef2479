"""The command line: help, dry runs, errors told once with exit code 2, and a training of one rank."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from triloom import __version__, cli, demo
from triloom.config import load
from triloom.errors import ConfigError
from triloom.plan import make_plan

TINY = """
[model]
layers = 1
hidden = 16
heads = 2
seq = 16
[train]
batch = 4
steps = 3
threads = 1
eval_batches = 1
"""


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def run(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "triloom", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run in this process; it must refuse. Returns what it said."""
    assert cli.main(words) == cli.REFUSED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("triloom: ")
    assert "Traceback" not in said.err
    return said.err


# ---------------------------------------------------------------- in this process


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"triloom {__version__}\n"
    assert cli.main(["--help"]) == 0
    assert "triloom train" in capsys.readouterr().out
    assert cli.main(["train", "--parallel.tp", "2", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--dry-run [RANKS]" in shown and "--model.kv_heads INT|NONE" in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tran"], "'tran' is not a command; commands are train, schedule, "),
        (["train", "--model.layer", "3"], "did you mean 'model.layers'?"),
        (["train", "--config"], "--config needs the path of a TOML file"),
        (["train", "--config", "a", "--config", "b"], "--config is given twice"),
        (["train", "--config=/no/such.toml"], "'/no/such.toml' cannot be read: No such file or directory"),
        (["train", "--dry-run", "x"], "--dry-run takes a number of ranks, got 'x'"),
        (["train", "--dry-run=0"], "--dry-run takes a number of ranks, got '0'"),
        (["train", "--dry-run", "--optim.lr=-1"], "optim.lr = '-1' (command line): must be above 0"),
        (["train", "--dry-run", "8", "--optim.lr=-1"], "optim.lr = '-1' (command line): must be above 0"),
        (["train", "--dry-run", "6", "--parallel.tp", "4"], "must divide the 6 ranks of the world; meshes that work"),
        (["train", "--parallel.tp", "2"], "pp=1 x tp=2 = 2 must divide the 1 ranks"),
        (["train", "--data.path", "/no/such"], "data.path = '/no/such' does not exist"),
        (["train", "--run.dir", "/dev/null"], "run.dir = '/dev/null' is a file"),
        (["train", "--run.dir", "/dev"], "run.dir = '/dev' is not empty; give another folder, or run.overwrite"),
        (["demo", "--steps", "3"], "triloom demo knows only --dir FOLDER, got '--steps'"),
        (["demo", "--dir", "/dev"], "'/dev' exists and is not an empty folder"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in refused(capsys, *words)


def test_several_problems_are_counted_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "train", "--optim.lr=-1", "--model.layers=x")
    assert said.splitlines()[0] == "triloom: 2 problems"
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize("ranks", [["2"], []])
def test_dry_run_prints_toml_that_loads_and_says_what_would_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, ranks: list[str]
) -> None:
    overrides = ["--parallel.pp", str(len(ranks) + 1), "--train.threads", "1", "--train.steps", "50"]
    assert cli.main(["train", "--dry-run", *ranks, *overrides]) == 0
    shown = capsys.readouterr().out
    path = tmp_path / "plan.toml"
    path.write_text(shown)
    world = len(ranks) + 1
    assert load([], path).config == make_plan(load(overrides).config, world, data_vocab=256).config
    assert "stage 0: embed blocks.0" in shown and "# model: 869,504 parameters" in shown
    assert "F:stage0@0" in shown and "proven: " in shown
    assert ("SEND:act0@0>1" in shown) == (world == 2)


# ---------------------------------------------------------------- as a process of its own


def test_one_rank_trains_where_python_starts_it(text: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(TINY)
    done = run("train", "--config", "tiny.toml", "--data.path", str(text), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2]
    assert tomllib.loads((folder / "config.toml").read_text())["data"]["path"] == str(text)
    assert f"runs/{folder.name}: config.toml metrics.jsonl" in done.stdout.splitlines()[-1]
    assert "\r" not in done.stdout, "no rewriting where no terminal is"
    assert "step 1/3" in done.stdout and "held-out loss" in done.stdout

    repeat = ("train", "--config", str(folder / "config.toml"), "--run.dir", str(folder))
    again = run(*repeat)
    assert again.returncode == 2
    assert "is not empty" in again.stderr and again.stdout == ""
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3, "a refused run touches nothing"

    over = run(*repeat, "--run.overwrite")
    assert over.returncode == 0, over.stderr
    repeated = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert repeated == [r["loss"] for r in records], "the resolved configuration repeats the run, bit for bit"


def test_a_refusal_is_an_exit_code_without_a_traceback() -> None:
    done = run("train", "--model.layer", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == ("triloom: model.layer = '3' (command line) is not a key; did you mean 'model.layers'?\n")


# ---------------------------------------------------------------- the demo's arithmetic


def curves(end: float, offset: float) -> dict[str, list[tuple[int, float]]]:
    steps = range(40)
    falling = [5.5 + (end - 5.5) * min(1.0, step / 30) for step in steps]
    return {
        "a": list(zip(steps, falling, strict=True)),
        "b": [(s, v + (offset if s == 7 else 0)) for s, v in zip(steps, falling, strict=True)],
    }


def test_demo_finds_the_largest_difference() -> None:
    result = demo.compare(curves(2.5, 0.01))
    assert result.problems == ()
    assert result.largest == (7, pytest.approx(0.01))
    assert "largest difference 1.0e-02 at step 7" in demo.summary(result)
    assert "a 5.50 -> 2.50, b 5.50 -> 2.50" in demo.summary(result)


@pytest.mark.parametrize(
    ("end", "offset", "says"),
    [(4.5, 0.0, "fell from 5.500 to 4.500"), (2.5, 0.2, "differ by 0.2"), (float("nan"), 0.0, "fell from")],
)
def test_demo_fails_if_the_loss_does_not_fall_or_the_runs_differ(end: float, offset: float, says: str) -> None:
    result = demo.compare(curves(end, offset))
    assert any(says in problem for problem in result.problems)
    assert "FAILED: " in demo.summary(result)


@pytest.mark.parametrize("overrides", demo.MESHES.values(), ids=demo.MESHES)
def test_demo_configuration_plans_on_its_ranks(overrides: tuple[str, ...]) -> None:
    loaded = load(overrides, demo.CONFIG)
    plan = make_plan(loaded.config, demo.RANKS, data_vocab=256, sources=loaded.sources)
    assert plan.mesh.size == demo.RANKS


def test_demo_meshes_use_all_three_axes() -> None:
    plans = [make_plan(load(o, demo.CONFIG).config, demo.RANKS, data_vocab=256) for o in demo.MESHES.values()]
    assert all(max(p.mesh.axis(axis) for p in plans) > 1 for axis in ("dp", "pp", "tp"))


def test_demo_without_mpirun_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs mpirun; run `make setup`"):
        demo.find_mpirun()
