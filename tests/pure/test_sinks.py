"""Sinks of the metrics: TensorBoard for real, wandb as a small fake (it is not installed here), a user's function."""

from __future__ import annotations

import importlib.machinery
import io
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from triloom import boot
from triloom.config import load
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.runlog import Result, read_metrics
from triloom.sinks import Sink, scalars
from triloom.train import train

WORDS = (
    "--model.layers 1 --model.hidden 16 --model.heads 2 --model.seq 16 --train.batch 4 "
    "--train.eval_batches 1 --run.plot false --run.overwrite true --run.timeline 0"
)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return str(path)


def trained(
    folder: Path, text: str, *words: str, ranks: int = 1, steps: int = 3, sinks: tuple[Sink, ...] = ()
) -> list[Result]:
    def body(group: Group) -> Result:
        world = boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=0, local_size=1)
        loaded = load(
            [*WORDS.split(), "--train.steps", str(steps), "--run.dir", str(folder), "--data.path", text, *words]
        )
        return train(loaded.config, world, out=io.StringIO(), sinks=sinks)

    before = torch.get_num_threads()
    try:
        return run_threads(ranks, body)
    finally:
        torch.set_num_threads(before)


def test_a_users_function_takes_every_record_once(tmp_path: Path, text: str) -> None:
    seen: list[Mapping[str, Any]] = []
    trained(tmp_path / "run", text, ranks=2, sinks=(seen.append,))
    on_disk = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [dict(r) for r in seen] == on_disk and len(seen) == 3


def test_tensorboard_has_every_number_at_its_step(tmp_path: Path, text: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(tmp_path / "run", text, "--log.tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert set(events.Tags()["scalars"]) == {name for r in records for name, _ in scalars(r)}
    for tag in ("loss", "lr", "peak_bytes/params"):
        got = [(e.step, e.value) for e in events.Scalars(tag)]
        assert got == [(r["step"], pytest.approx(dict(scalars(r))[tag])) for r in records]
    assert [e.step for e in events.Scalars("held_out_loss")] == [2]


def scalar_steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [e.step for e in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("loss")]


def test_tensorboard_of_a_run_that_goes_on_and_of_one_that_is_overwritten(tmp_path: Path, text: str) -> None:
    """Checkpoints after steps 2 and 4 of 5: what is resumed logs step 4 again, and not twice."""
    run = tmp_path / "run"
    trained(run, text, "--log.tensorboard", "--checkpoint.every", "2", steps=5)
    shutil.rmtree(run / "checkpoints" / "step-00000005")
    trained(run, text, "--log.tensorboard", "--checkpoint.every", "2", "--run.resume", str(run), steps=7)
    assert scalar_steps(run) == [0, 1, 2, 3, 4, 5, 6]
    trained(run, text, "--log.tensorboard", steps=2)
    assert scalar_steps(run) == [0, 1]


class FakeWandb(types.ModuleType):
    """What the sink uses of wandb."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.told: list[tuple[str, dict[str, Any]]] = []

    def init(self, **options: Any) -> FakeWandb:
        self.told.append(("init", options))
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append(("log", {**values, "step": step}))

    def finish(self) -> None:
        self.told.append(("finish", {}))


def test_wandb_is_offline_and_is_finished(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trained(tmp_path / "run", text, "--log.wandb")
    assert [what for what, _ in fake.told] == ["init", "log", "log", "log", "finish"]
    begun = fake.told[0][1]
    assert begun["mode"] == "offline" and begun["dir"] == str(tmp_path / "run")
    assert begun["config"]["train"]["steps"] == 3
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [values for what, values in fake.told if what == "log"] == [
        {**dict(scalars(r)), "step": r["step"]} for r in records
    ]


def test_a_missing_package_is_told_before_the_first_step(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triloom.sinks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log.tensorboard = true and log.wandb = true: .* 'triloom\[log\]'"):
        trained(tmp_path / "run", text, "--log.tensorboard", "--log.wandb", ranks=2)
    assert not (tmp_path / "run").exists()
