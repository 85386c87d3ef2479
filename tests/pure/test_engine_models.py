"""Awkward models through the engine: tied, frozen, unused, empty, pytrees, changing shapes, deferred W."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom.actions import Program, compute
from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import zero0, zero1, zero2, zero3
from triloom.schedules import Schedule

WIDTH = 6
RULE = AdamW(lr=0.03, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1)


def split_backward(stages: int, microbatches: int) -> Program:
    """All F, then all B, then all W: weight gradients as late as they can be."""
    rows = tuple(tuple(compute(op, s, m) for op in "FBW" for m in range(microbatches)) for s in range(stages))
    return Program(rows, tuple(range(stages)), microbatches, "split")


class Tied(nn.Module):
    """A use of a shared matrix, transposed or not, plus its own bias."""

    def __init__(self, shared: nn.Parameter, transpose: bool) -> None:
        super().__init__()
        self.shared, self.transpose = shared, transpose
        self.bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ (self.shared.t() if self.transpose else self.shared)) + self.bias


class Odd(nn.Module):
    """Frozen, unused, zero-sized and one-element parameters; a pytree in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5, dtype=torch.float64), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Any) -> Any:
        x = x["x"] if isinstance(x, dict) else x
        return {"x": x * self.scalar + self.frozen + self.empty.sum(), "note": 3, "ids": torch.arange(2)}


class Frozen(nn.Module):
    """A stage without a trainable parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) * self.scale


class Last(nn.Module):
    def forward(self, x: Any) -> torch.Tensor:
        return x["x"][:, :2]


def randomize(made: list[nn.Module]) -> list[nn.Module]:
    gen = torch.Generator().manual_seed(5)
    for m in made:
        for p in m.parameters():
            if p.requires_grad and p.numel() > 1:
                p.data = torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.5
    return made


def tied_model() -> list[nn.Module]:
    shared = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    return randomize([Tied(shared, False), nn.Linear(WIDTH, WIDTH).double(), Tied(shared, True), Tied(shared, False)])


def odd_model() -> list[nn.Module]:
    return randomize([nn.Linear(WIDTH, WIDTH).double(), Frozen(), Odd(), Odd(), Last()])


def frozen_first() -> list[nn.Module]:
    return randomize([Frozen(), Frozen(), nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, 2).double()])


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], int]] = {
    "tied": (tied_model, WIDTH), "odd": (odd_model, 2), "frozen_first": (frozen_first, 2),
}  # fmt: skip


def batch(step: int, outputs: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(40 + step)
    draw = lambda n: torch.randn(rows, n, generator=gen, dtype=torch.float64)  # noqa: E731
    return draw(WIDTH), draw(outputs)


def plain(name: str, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    make, outputs = MODELS[name]
    model = nn.Sequential(*make())
    every = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in every if p.ndim >= 2], "weight_decay": 0.1},
              {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    opt = torch.optim.AdamW(groups, lr=0.03, betas=(0.8, 0.99), eps=1e-3)
    losses = []
    for step in range(steps):
        x, y = batch(step, outputs)
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(every, 1.0)
        opt.step()
        losses.append(float(loss.detach()))
    return losses, {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def train(group: Group, name: str, steps: int = 4, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    make, outputs = MODELS[name]
    mesh = make_mesh(group.size, pp=options.pop("pp", 1))
    engine = Engine(make(), mean_loss(F.mse_loss), world=group, mesh=mesh, optimizer=RULE, **options)
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(steps):
        x, y = (t.tensor_split(dp.size)[dp.rank] for t in batch(step, outputs))
        losses.append(engine.step(x, y).loss)
    return losses, engine.full_state()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks,pp", [(1, 1), (2, 1), (2, 2), (3, 3), (4, 4), (4, 2)])
@pytest.mark.parametrize("schedule", ["1f1b", split_backward])
def test_awkward_models_equal_plain(name: str, ranks: int, pp: int, schedule: str | Schedule) -> None:
    losses, params = plain(name, 4)
    for placement in (
        zero0().with_(activations="recompute"),
        zero1().with_(bucket_bytes=64),
        zero2().with_(bucket_bytes=64),
        zero3().with_(bucket_bytes=64),
    ):
        for got, state in run_threads(
            ranks, partial(train, name=name, pp=pp, schedule=schedule, microbatches=2, placement=placement)
        ):
            assert got == pytest.approx(losses, rel=1e-11)
            for key, value in state.items():
                torch.testing.assert_close(value, params[key], rtol=1e-10, atol=1e-12)


def test_deferred_weight_gradients_are_the_same_bits() -> None:
    for name in MODELS:
        for ranks, pp in ((1, 1), (2, 2), (4, 2)):
            runs = [
                run_threads(ranks, partial(train, name=name, pp=pp, schedule=s, microbatches=3))
                for s in ("1f1b", "gpipe", split_backward)
            ]
            for run in runs[1:]:
                for (losses, state), (losses0, state0) in zip(run, runs[0], strict=True):
                    assert losses == losses0
                    assert all(torch.equal(state[k], state0[k]) for k in state0)


def test_shapes_may_change_between_steps_and_microbatches() -> None:
    """A batch of 5, then 7, then 5 rows over 2 microbatches: the boundary shapes differ each time."""

    def run(group: Group) -> list[float]:
        engine = Engine(tied_model(), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=group.size),
                        optimizer=RULE, microbatches=2)  # fmt: skip
        return [engine.step(*batch(i, WIDTH, rows)).loss for i, rows in enumerate((5, 7, 5, 7, 2))]

    alone = run_threads(1, run)[0]
    for ranks in (2, 4):
        for losses in run_threads(ranks, run):
            assert losses == pytest.approx(alone, rel=1e-12)


def test_evaluate_changes_nothing_and_equals_the_loss() -> None:
    def run(group: Group) -> None:
        engine = Engine(tied_model(), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=2),
                        optimizer=RULE, microbatches=2)  # fmt: skip
        before = {k: v.clone() for k, v in engine.full_state().items()}
        evaluated = engine.evaluate(*batch(0, WIDTH))
        assert all(torch.equal(v, before[k]) for k, v in engine.full_state().items())
        assert evaluated.loss == engine.step(*batch(0, WIDTH)).loss
        assert engine.evaluate(*batch(0, WIDTH)).loss < evaluated.loss

    run_threads(4, run)


def test_two_engines_in_one_process_do_not_meet() -> None:
    engines = [Engine(tied_model(), mean_loss(F.mse_loss), optimizer=RULE) for _ in range(2)]
    alone = Engine(tied_model(), mean_loss(F.mse_loss), optimizer=RULE)
    interleaved = [[e.step(*batch(i, WIDTH)).loss for e in engines] for i in range(3)]
    assert [row[0] for row in interleaved] == [row[1] for row in interleaved]
    assert [row[0] for row in interleaved] == [alone.step(*batch(i, WIDTH)).loss for i in range(3)]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"schedule": "zigzag"}, "zigzag.*choose one of"),
        ({"stages": (3, 3)}, "sum to 5 units"),
        ({"ties": (("0.weights", "1.weight"),)}, "0.weights"),
        ({"ties": (("9.weight", "1.weight"),)}, "belongs to no unit"),
        ({"loss": nn.MSELoss()}, "mean_loss"),
        ({"loss": F.mse_loss}, "wrap a plain loss"),
    ],
)
def test_bad_input_is_named_on_every_rank(change: dict[str, Any], message: str) -> None:
    options = {"loss": mean_loss(F.mse_loss), **change}
    loss = options.pop("loss")

    def run(group: Group) -> None:
        units = [nn.Linear(4, 4) for _ in range(4)]
        with pytest.raises((ConfigError, TypeError), match=message):
            Engine(copy.deepcopy(units), loss, world=group, mesh=make_mesh(group.size, pp=2), **options)

    run_threads(2, run)


def test_batch_too_small_for_its_microbatches() -> None:
    engine = Engine(tied_model(), mean_loss(F.mse_loss), microbatches=4)
    with pytest.raises(ConfigError, match="batch of 3 samples .* 4 microbatches"):
        engine.step(*batch(0, WIDTH, rows=3))
