"""Where a step's time went: waits for other ranks by kind, and updates."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom import cli
from triloom.engine import Engine
from triloom.groups.base import Done, Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.parallel.build import mean_loss
from triloom.parallel.spent import KINDS, Spent
from triloom.placement import NAMED


class Late(nn.Linear):
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(8, 8)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(x)


def test_waits_are_summed_by_kind() -> None:
    spent = Spent()
    spent.add("receive", 0, 2_000_000_000)
    spent.receives(lambda begin, end: None)(0, 500_000_000)
    spent.wait("gather", Done())
    spent.add("optimizer", 0, 250_000_000)
    seconds = spent.seconds()
    assert list(seconds) == ["exposed", *KINDS, "optimizer"]
    assert seconds["receive"] == 2.5 and seconds["optimizer"] == 0.25
    assert seconds["exposed"] == pytest.approx(2.5 + seconds["gather"])
    spent.start()
    assert set(spent.seconds().values()) == {0.0}


@pytest.mark.parametrize("placement", ["zero1", "zero3"])
def test_who_is_early_waits(placement: str) -> None:
    """The first of two dp ranks is 0.15 s ahead: it waits for the others, and they for nobody."""

    def run(group: Group) -> dict[str, float]:
        units = [Late(0.15 if group.rank else 0.0), nn.Linear(8, 8)]
        engine = Engine(units, mean_loss(F.mse_loss), world=group, placement=NAMED[placement](), clip=None)
        x = torch.ones(2, 8)
        for _ in range(2):
            engine.step(x, x)
        return engine.state.spent.seconds()

    first, second = run_threads(2, run)
    assert first["exposed"] >= 0.1 > second["exposed"]
    assert first["reduce"] + first["gather"] + first["agree"] >= 0.1
    assert 0 < first["optimizer"] < 0.1


def test_a_pipeline_waits_for_tensors() -> None:
    def run(group: Group) -> dict[str, float]:
        engine = Engine([Late(0.1), nn.Linear(8, 8)], mean_loss(F.mse_loss), world=group, mesh=make_mesh(2, pp=2),
                        stages=(1, 2))  # fmt: skip
        x = torch.ones(2, 8)
        for _ in range(2):
            engine.step(x, x)
        return engine.state.spent.seconds()

    assert run_threads(2, run)[1]["receive"] >= 0.08


def test_a_run_writes_them(tmp_path: Path) -> None:
    words = [
        "--model.layers",
        "1",
        "--model.hidden",
        "16",
        "--model.heads",
        "2",
        "--model.seq",
        "8",
        "--train.batch",
        "2",
    ]
    folder = tmp_path / "run"
    done = partial(cli.main, ["train", *words, "--train.steps", "3", "--run.dir", str(folder), "--run.plot", "false"])
    assert done() == 0
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert set(record["seconds"]) == {"exposed", "optimizer", *KINDS}
        assert record["seconds"]["exposed"] >= 0 and 0 < record["seconds"]["optimizer"] < record["step_ms"] / 1e3
