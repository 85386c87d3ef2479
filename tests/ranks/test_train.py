"""``triloom train`` under mpirun: the files of a run, one voice for every error, the same losses on every mesh."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from harness import launch
from triloom.boot import World
from triloom.config import Config, load
from triloom.data.tokenizers import CHARACTERS, TOKENIZER
from triloom.groups.objects import gather_objects
from triloom.runlog import FILES, Result
from triloom.together import SetupError
from triloom.train import train

KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "skipped",
    "loss_scale",
    "tokens",
    "tokens_per_s",
    "step_ms",
    "peak_bytes",
    "held_out_loss",
    "held_out_perplexity",
    "held_out_bits_per_byte",
    "pipeline",
    "seconds",
}
TRAIN = [sys.executable, "-m", "triloom", "train"]

TINY = """
[model]
layers = 2
hidden = 16
heads = 2
seq = 16
[train]
batch = 8
steps = 4
threads = 1
eval_batches = 1
deadline = 30
[run]
plot = false
[data]
path = {path!r}
"""


def tiny(folder: Path) -> Path:
    """Configuration and text of a small run."""
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    path = folder / "tiny.toml"
    path.write_text(TINY.format(path=str(text)))
    return path


# ---------------------------------------------------------------- the command


def test_a_run_leaves_every_promised_number(tmp_path: Path) -> None:
    path, folder = tiny(tmp_path), tmp_path / "run"
    words = ["--config", str(path), "--run.dir", str(folder), "--run.plot=true"]
    words += ["--parallel.pp", "2", "--parallel.tp", "2", "--parallel.sequence"]
    done = launch(4, [*TRAIN, *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    for r in records:
        assert set(r) == KEYS
        assert all(
            isinstance(r[key], (int, float)) and r[key] >= 0
            for key in KEYS - {"peak_bytes", "pipeline", "seconds"}
            if not (key.startswith("held_out") and r["step"] < 3)
        )
        assert r["tokens"] == (r["step"] + 1) * 8 * 16
        assert r["tokens_per_s"] == pytest.approx(8 * 16 / r["step_ms"] * 1e3)
        assert {"params", "grads", "moments", "activations"} <= set(r["peak_bytes"])
        assert all(isinstance(size, int) and size > 0 for size in r["peak_bytes"].values())
        assert 0 < r["seconds"]["exposed"] < r["step_ms"] / 1e3
    assert [r["held_out_loss"] is None for r in records] == [True, True, True, False]
    config = load([], folder / "config.toml").config
    assert (config.parallel.dp, config.schedule.microbatches, config.model.vocab) == (1, 4, 256)
    lines = done.stdout.replace("\r\n", "\n").splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/4", "step 4/4"]
    assert "\r" not in "".join(lines), "no rewriting where no terminal is"
    assert lines[-1].startswith(f"{folder}: config.toml metrics.jsonl timeline.json")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in done.stdout
    else:
        assert sorted(p.name for p in folder.iterdir()) == sorted(set(FILES) - {CHARACTERS, TOKENIZER})


def test_an_error_that_every_rank_finds_is_told_once() -> None:
    done = launch(2, [*TRAIN, "--model.layer", "3"])
    assert done.returncode == 2
    assert done.stderr.count("did you mean 'model.layers'?") == 1
    assert "Traceback" not in done.stderr and "uncaught" not in done.stderr
    assert done.stdout == ""


# ---------------------------------------------------------------- the function


MESHES = ("--parallel.dp 2", "--parallel.pp 2 --schedule.kind gpipe", "--parallel.tp 2 --parallel.sequence")


@pytest.mark.ranks(2)
def test_every_mesh_trains_the_same(world: World, tmp_path: Path) -> None:
    path = tiny(tmp_path)

    def run(words: str) -> Result:
        config = load(["--run.dir", str(tmp_path / "run"), "--run.overwrite", *words.split()], path).config
        return train(config, world, out=io.StringIO())

    first, *others = [run(words) for words in MESHES]
    assert first.last_loss < first.first_loss
    assert (first.folder is None) == (world.rank > 0)
    for other in others:
        assert other.first_loss == pytest.approx(first.first_loss, abs=1e-5)
        assert other.last_loss == pytest.approx(first.last_loss, abs=1e-4)
        assert other.held_out_loss == pytest.approx(first.held_out_loss, abs=1e-4)


@pytest.mark.ranks(2)
def test_what_only_rank_0_finds_stops_both(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "used"
    folder.mkdir()
    if world.rank == 0:
        (folder / "something").write_text("")
        given = str(folder)
    else:
        given = str(tmp_path / "other")
    config = load(["--run.dir", given], tiny(tmp_path)).config
    with pytest.raises(SetupError, match=r"rank 0: run.dir = .* is not empty"):
        train(config, world, out=io.StringIO())


@pytest.mark.ranks(2)
def test_ranks_with_different_text_are_refused(world: World, tmp_path: Path) -> None:
    path = tiny(tmp_path)
    if world.rank:
        text = Path(load([], path).config.data.path or "")
        text.write_text(text.read_text().replace("fox", "dog"))
    config: Config = load([], path).config
    with pytest.raises(SetupError, match="the ranks disagree on the data: rank 0: 8800 tokens"):
        train(config, world, out=io.StringIO())


@pytest.mark.ranks(2)
def test_ranks_with_different_words_are_told_apart(world: World, tmp_path: Path) -> None:
    words = ["--run.dir", str(tmp_path / "run"), *(["--optim.lr", "0.5"] if world.rank else [])]
    config = load(words, tiny(tmp_path)).config
    with pytest.raises(SetupError, match=r"disagree on optim.lr: rank 0: 0.001; rank 1: 0.5; start every rank with"):
        train(config, world, out=io.StringIO())
    assert not (tmp_path / "run").exists()


@pytest.mark.ranks(2)
def test_one_rank_tokenises_for_both(world: World, tmp_path: Path) -> None:
    folder = Path(gather_objects(world.group, str(tmp_path))[0])
    path = tiny(tmp_path)
    words = ["--run.dir", str(folder / "run"), "--data.tokenizer", "char", "--data.cache", str(tmp_path / "cache")]
    if world.rank == 1:  # whoever works must be rank 0, whose folder rank 1 is told to read
        words[-1] = str(folder / "cache")
    result = train(load(words, path).config, world, out=io.StringIO())
    assert result.evaluation is not None and result.evaluation.bits_per_byte is not None
    assert (folder / "run" / CHARACTERS).exists()
    assert len(list((folder / "cache").iterdir())) == 2, "the vocabulary and the tokens, and nothing half done"


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (tmp_path / "mine.py").write_text(readme.split("```python\n")[1].split("```")[0])
    done = launch(2, [sys.executable, "mine.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.split()
    assert said[0] == "loss" and len(said) == 2
    assert float(said[1]) < 2.0, "a quarter of the variance of the targets"
