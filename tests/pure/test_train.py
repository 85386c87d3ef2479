"""The training job on ranks that are threads: learning rate, every mesh alike, what happens when it diverges."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from triloom import boot
from triloom.config import load
from triloom.errors import TriloomError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.plan import make_plan
from triloom.runlog import Result, read_metrics
from triloom.train import make_optimizer, train

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
[optim]
lr = 1e-2
[run]
plot = false
"""


def rates(words: str, *steps: int) -> list[float]:
    lr = make_optimizer(make_plan(load(words.split()).config, 1, data_vocab=256).config).lr
    assert callable(lr)
    return [lr(step) for step in steps]


def test_learning_rate_of_a_configuration() -> None:
    assert rates("--optim.lr 1 --optim.warmup 4 --train.steps 20", 0, 3, 4, 20) == [0.25, 1.0, 1.0, 0.1]
    assert rates("--optim.lr 1 --optim.warmup 2 --optim.decay constant", 0, 1, 2, 500) == [0.5, 1.0, 1.0, 1.0]
    assert rates("--optim.lr 1 --train.steps 50", 0, 4, 50) == [0.2, 1.0, 0.1]
    assert rates("--optim.lr 1 --train.steps 5 --optim.min_lr 0", 0, 5) == [1.0, 0.0]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + f"dir = '{tmp_path / 'run'}'\n[data]\npath = '{text}'\n")
    return path


def trained(config: Path, ranks: int, *words: str) -> list[Result]:
    """The job on ranks that are threads."""

    def body(group: Group) -> Result:
        world = boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=0, local_size=1)
        loaded = load([*words, "--run.overwrite"], config)
        return train(loaded.config, world, sources=loaded.sources, out=io.StringIO())

    before = torch.get_num_threads()
    try:
        return run_threads(ranks, body)
    finally:
        torch.set_num_threads(before)


def test_every_mesh_trains_the_same(config: Path) -> None:
    alone = trained(config, 1)[0]
    assert alone.last_loss < alone.first_loss - 0.1
    for words in (
        "--parallel.dp 2",
        "--parallel.pp 2",
        "--parallel.tp 2 --parallel.sequence",
        "--placement.name zero0",
    ):
        results = trained(config, 2, *words.split())
        assert results[0].folder is not None and results[1].folder is None
        for result in results:
            assert result.last_loss == results[0].last_loss
            assert result.last_loss == pytest.approx(alone.last_loss, abs=1e-4)
            assert result.held_out_loss == pytest.approx(alone.held_out_loss, abs=1e-4)
        assert len(results[0].peak_bytes) == 2


def test_gradients_that_are_not_finite_are_skipped_and_end_the_run(config: Path) -> None:
    words = ("--optim.lr", "1e35", "--optim.clip", "none", "--optim.warmup", "0", "--parallel.dp", "2")
    with pytest.raises(TriloomError, match=r"norm (nan|inf) at step 1, .* 4 steps in a row \(max_skips=3\)"):
        trained(config, 2, *words, "--optim.max_skips", "3")
    records = read_metrics(config.parent / "run" / "metrics.jsonl")
    assert [(r["step"], r["skipped"]) for r in records] == [(0, False), (1, True), (1, True), (1, True)]
