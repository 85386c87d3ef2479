"""Every example at a tiny size on two ranks, all in one launch: it runs, and the ranks end up with the same."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from triloom.boot import World
from triloom.groups.objects import broadcast_object, gather_objects
from triloom.runlog import read_metrics

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(world: World, value: Any) -> Any:
    """The value, which every rank must have."""
    everyone = gather_objects(world.group, value)
    assert all(other == everyone[0] for other in everyone), everyone
    return everyone[0]


@pytest.mark.ranks(2)
def test_own_model(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    loss = same(world, example("own_model").main(steps=51, samples=32, width=12))
    assert loss < 0.3, "the first loss is above 1"
    assert ("step   50  loss" in capsys.readouterr().out) == (world.rank == 0)


@pytest.mark.ranks(2)
def test_gpt2_on_characters(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    loss = same(world, example("gpt2_characters").main(str(text), steps=12, batch=8, seq=16, hidden=32))
    assert loss < math.log(28) - 0.2
    assert ("28 different ones" in capsys.readouterr().out) == (world.rank == 0)


@pytest.mark.ranks(2)
def test_llama_with_bpe(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, run = tmp_path / "text.txt", broadcast_object(world.group, str(tmp_path / "run"))
    text.write_text("".join(f"the {i}th quick brown fox jumps over {i % 7} lazy dogs\n" for i in range(600)))
    words = f"--data.path {text} --data.vocab 300 --model.layers 1 --model.hidden 24 --model.heads 6 --model.seq 16"
    words += f" --train.steps 6 --train.batch 8 --train.eval_every 3 --checkpoint.every 3 --run.dir {run}"
    words += " --run.plot=false --check.replicas 2 --train.threads 1"
    assert same(world, example("llama_bpe").main(words.split())) < math.log(300)
    if world.rank == 0:
        records = read_metrics(Path(run) / "metrics.jsonl")
        assert [r["step"] for r in records if r["held_out_loss"] is not None] == [2, 5]
        told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("bits a byte")]
        assert len([line for line in told if line.startswith("after ")]) >= 2
        assert {p.name for p in Path(run).iterdir()} >= {"tokenizer.json", "checkpoints"}


@pytest.mark.ranks(2)
def test_resnet(world: World) -> None:
    assert same(world, example("resnet").main(steps=40, batch=32, width=4)) > 0.35, "one in four by chance"


@pytest.mark.ranks(2)
def test_search(world: World) -> None:
    best = same(world, example("search").main(rates=(1e-4, 1e-2), widths=(8,), steps=30))
    assert best == [1e-2, 8]


def test_each_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in listed for path in EXAMPLES.glob("*.py"))
