"""A user's convolutions with batch norm and recurrent nets: data parallel, as one unit and as several, against one
process at the same microbatches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import NAMED

BATCH, MICRO, STEPS, CLASSES = 8, 4, 4, 5
"""MICRO microbatches a step over all dp ranks, whose statistics a batch norm takes."""
RULE: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4}


class Block(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.around = nn.Conv2d(channels, out, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.around(x))


class Recurrent(nn.Module):
    """Two layers of LSTM over a sequence; the last output counts."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lstm(x)[0]
        return out[:, -1]


def resnet() -> list[nn.Module]:
    stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, CLASSES))
    return settled([stem, Block(6, 8), Block(8, 10), head])


def recurrent() -> list[nn.Module]:
    return settled([nn.Linear(3, 6), Recurrent(), nn.Linear(8, CLASSES)])


def settled(units: list[nn.Module]) -> list[nn.Module]:
    gen = torch.Generator().manual_seed(2)
    for m in units:
        m.double()
        for p in m.parameters():
            p.data.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.3)
    return units


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "resnet": (resnet, (3, 8, 8)), "recurrent": (recurrent, (7, 3)),
}  # fmt: skip


def batch(name: str, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(30 + step)
    x = torch.randn(BATCH, *MODELS[name][1], generator=gen, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=gen)


Result = tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor], float]
"""Losses, parameters, this rank's buffers, and the loss of an evaluation."""


def train(group: Group, name: str, single: bool, placement: str, recompute: bool = False, pp: int = 1) -> Result:
    made = MODELS[name][0]()
    units = [nn.Sequential(*made)] if single else made
    engine = Engine(
        units, mean_loss(F.cross_entropy), world=group, mesh=make_mesh(group.size, pp=pp), dtype=torch.float64,
        placement=NAMED[placement]().with_(activations="recompute" if recompute else "keep", bucket_bytes=2000),
        optimizer=AdamW(weight_decay=0.0, **RULE), clip=None, microbatches=MICRO * pp // group.size,
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(STEPS):
        losses.append(engine.step(*(t.tensor_split(dp.size)[dp.rank] for t in batch(name, step))).loss)
    evaluated = engine.evaluate(*(t.tensor_split(dp.size)[dp.rank] for t in batch(name, 0))).loss
    state = engine.full_state()
    buffers = {f"{u}.{n}": t.clone() for u, m in engine.modules.items() for n, t in m.named_buffers()}
    engine.close()
    return losses, state, buffers, evaluated


def plain(name: str, ranks: int) -> tuple[list[float], dict[str, torch.Tensor], list[dict[str, torch.Tensor]], float]:
    """One process, microbatch by microbatch; the buffers of each dp rank, which sees its own microbatches only."""
    model = nn.Sequential(*MODELS[name][0]())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **RULE)
    start = {n: t.clone() for n, t in model.named_buffers()}
    kept = [{n: t.clone() for n, t in start.items()} for _ in range(ranks)]
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for i, (x, y) in enumerate(zip(*(t.tensor_split(MICRO) for t in batch(name, step)), strict=True)):
            mine = kept[i * ranks // MICRO]
            model.load_state_dict(mine, strict=False)
            loss = F.cross_entropy(model(x), y) / MICRO
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            mine.update({n: t.clone() for n, t in model.named_buffers()})
        optimizer.step()
        losses.append(total)
    model.load_state_dict(kept[0], strict=False)
    model.eval()
    x, y = batch(name, 0)
    return (
        losses,
        {n: p.detach() for n, p in model.named_parameters()},
        kept,
        float(F.cross_entropy(model(x), y).detach()),
    )


def check(got: list[Result], name: str, ranks: int) -> None:
    losses, params, kept, evaluated = plain(name, ranks)
    for rank, (mine, state, buffers, loss) in enumerate(got):
        assert mine == pytest.approx(losses, rel=1e-9)
        assert loss == pytest.approx(evaluated, rel=1e-9)  # everywhere with the statistics of dp rank 0
        for ours, theirs in ((state, params), (buffers, kept[rank])):
            for key, value in theirs.items():
                match = next(t for k, t in ours.items() if k in (key, f"0.{key}"))
                torch.testing.assert_close(match, value, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("placement", NAMED)
@pytest.mark.parametrize("single", [True, False], ids=["one unit", "several units"])
@pytest.mark.parametrize("name", MODELS)
def test_data_parallel_is_one_process_at_the_same_microbatches(name: str, single: bool, placement: str) -> None:
    check(run_threads(2, partial(train, name=name, single=single, placement=placement)), name, 2)


@pytest.mark.parametrize("single", [True, False], ids=["one unit", "several units"])
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_moves_statistics_once(name: str, single: bool) -> None:
    for placement in ("zero1", "zero3"):
        got = run_threads(2, partial(train, name=name, single=single, placement=placement, recompute=True))
        check(got, name, 2)


@pytest.mark.parametrize("name", MODELS)
def test_pipelines_of_them(name: str) -> None:
    losses, params, _, evaluated = plain(name, 2)
    for mine, state, _, loss in run_threads(4, partial(train, name=name, single=False, placement="zero2", pp=2)):
        assert mine == pytest.approx(losses, rel=1e-9) and loss == pytest.approx(evaluated, rel=1e-9)
        for key, value in params.items():
            torch.testing.assert_close(state[key], value, rtol=1e-7, atol=1e-9)
