"""Every kind of state in a checkpoint: of all optimizers, in all precisions, of compressed reductions, of the modules
themselves; on the layout it was written on and, where it can be, on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint_cases as cases
import optim_cases
from triloom.engine import Engine
from triloom.errors import CheckpointError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import SGD, Adafactor, AdamW, AdamW8bit, Lion, Muon, Optimizer, TorchOptimizer, muon_with_adamw
from triloom.parallel.build import mean_loss
from triloom.parallel.reduction import TopK
from triloom.placement import zero0, zero1, zero2, zero3
from triloom.scaling import dynamic

Make = Callable[[Group], Engine]


@dataclass(frozen=True)
class Kind:
    """An engine on a model with awkward parameters, and the states it must have stored."""

    optimizer: Optimizer
    states: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


MUON = muon_with_adamw(lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, momentum=0.95, nesterov=True)

KINDS = {
    "adamw": Kind(AdamW(lr=0.01), ("exp_avg", "exp_avg_sq"), torch.float64),
    "masters": Kind(AdamW(lr=0.01), ("master", "exp_avg"), torch.bfloat16),
    "stochastic": Kind(
        AdamW(lr=0.01),
        ("exp_avg",),
        torch.bfloat16,
        {"placement": zero1().with_(rounding="stochastic")},
    ),
    "kahan": Kind(
        AdamW(lr=0.01), ("compensation", "exp_avg"), torch.bfloat16, {"placement": zero2().with_(rounding="kahan")}
    ),
    "fp16": Kind(AdamW(lr=0.01), ("master",), torch.float16, {"scaling": dynamic(interval=2)}),
    "8bit": Kind(AdamW8bit(lr=0.01), ("exp_avg", "exp_avg_max", "exp_avg_root", "exp_avg_root_max")),
    "sgd": Kind(SGD(lr=0.01), ("momentum",)),
    "lion": Kind(Lion(lr=0.001), ("exp_avg",)),
    "muon": Kind(MUON, ("momentum", "exp_avg")),
    "adafactor": Kind(Adafactor(lr=0.01), ("rows", "columns", "exp_avg_sq")),
    "torch": Kind(TorchOptimizer(torch.optim.NAdam, lr=0.01), ("mu_product", "step", "exp_avg")),
    "zero0": Kind(TorchOptimizer(torch.optim.NAdam, lr=0.01), ("step",), options={"placement": zero0()}),
    "zero3": Kind(AdamW8bit(lr=0.01), ("exp_avg",), options={"placement": zero3().with_(bucket_bytes=900)}),
}


def make(kind: Kind, world: Group, **mesh: int) -> Engine:
    options = {"microbatches": 2, "clip": 0.5, **kind.options}
    return Engine(
        optim_cases.units(kind.dtype), mean_loss(F.mse_loss), world=world, mesh=make_mesh(world.size, **mesh),
        optimizer=kind.optimizer, dtype=kind.dtype, **options,
    )  # fmt: skip


def steps(engine: Engine, count: int) -> list[str]:
    dp, told = engine.groups.axis("dp"), []
    for _ in range(count):
        x, y = (t.tensor_split(dp.size)[dp.rank] for t in optim_cases.data(engine.steps, engine.scope.dtype))
        told.append(engine.step(x, y).loss.hex())
    return told


FULL = ("adamw", "fp16", "lion", "sgd", "stochastic")
"""Whose states are like those of another kind."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full) if name in FULL else name for name in KINDS]
)
def test_every_state_is_there_again(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]

    def whole(world: Group) -> list[str]:
        engine = make(kind, world)
        steps(engine, 3)
        engine.save(tmp_path / "middle")
        told = steps(engine, 3)
        engine.save(tmp_path / "end")
        return told

    def again(world: Group, **mesh: int) -> list[str]:
        engine = make(kind, world, **mesh)
        steps(engine, 1)
        engine.load(tmp_path / "middle")
        engine.save(tmp_path / f"copy{world.size}{mesh.get('pp', 1)}")
        told = steps(engine, 3)
        engine.save(tmp_path / "again")
        return told

    want = run_threads(2, whole)
    kinds = {n.partition("/")[0] for n in cases.canonical(tmp_path / "middle")}
    assert {"params", "fixed", *kind.states} <= kinds
    assert run_threads(2, again) == want
    assert cases.canonical(tmp_path / "again", own=True) == cases.canonical(tmp_path / "end", own=True)
    run_threads(3, again)
    run_threads(2, lambda world: again(world, pp=2))
    for copy in ("copy21", "copy31", "copy22"):
        assert cases.canonical(tmp_path / copy) == cases.canonical(tmp_path / "middle"), copy


def test_blocks_fit_only_the_split_they_were_cut_for(tmp_path: Path) -> None:
    case = cases.variants()

    def trained(world: Group) -> None:
        engine = cases.make_engine(world, case["tp2"], AdamW8bit(lr=0.01))
        cases.steps(engine, 2)
        engine.save(tmp_path / "tp2")

    def other(world: Group) -> None:
        cases.make_engine(world, case["dp2"], AdamW8bit(lr=0.01)).load(tmp_path / "tp2")

    def same(world: Group) -> None:
        engine = cases.make_engine(world, case["dp2_tp2"], AdamW8bit(lr=0.01))
        engine.load(tmp_path / "tp2")
        engine.save(tmp_path / "again")

    run_threads(2, trained)
    with pytest.raises(CheckpointError, match=r"holds no exp_avg/.* but exp_avg/.*\[0:.*split over tp .* was tp=2"):
        run_threads(2, other)
    run_threads(4, same)
    assert cases.canonical(tmp_path / "again") == cases.canonical(tmp_path / "tp2")


def test_muon_on_tp_moves_to_any_tp(tmp_path: Path) -> None:
    """Its momentum has the parameter's shape."""
    case = cases.variants()

    def trained(world: Group) -> None:
        engine = cases.make_engine(world, case["tp2"], Muon(lr=0.01))
        cases.steps(engine, 2)
        engine.save(tmp_path / "tp2")

    def other(world: Group) -> None:
        engine = cases.make_engine(world, case["dp2"], Muon(lr=0.01))
        engine.load(tmp_path / "tp2")
        engine.save(tmp_path / "again")

    run_threads(2, trained)
    run_threads(2, other)
    assert cases.canonical(tmp_path / "again") == cases.canonical(tmp_path / "tp2")


def test_what_a_compressed_reduction_has_not_sent_is_kept_or_dropped_with_a_note(tmp_path: Path) -> None:
    case = cases.variants()["dp2"]

    def whole(world: Group) -> cases.Steps:
        engine = cases.make_engine(world, case, reduction=TopK(0.1))
        cases.steps(engine, 3)
        engine.save(tmp_path / "middle")
        return cases.steps(engine, 3)

    def again(world: Group) -> cases.Steps:
        engine = cases.make_engine(world, case, reduction=TopK(0.1))
        assert engine.load(tmp_path / "middle").notes == ()
        return cases.steps(engine, 3)

    def elsewhere(world: Group) -> tuple[str, ...]:
        engine = cases.make_engine(world, cases.variants()["dp3"], reduction=TopK(0.1))
        notes = engine.load(tmp_path / "middle").notes
        assert not any(b.memory for b in engine.state.buckets)
        return notes

    assert run_threads(2, whole) == run_threads(2, again)
    (note,) = run_threads(3, elsewhere)[0]
    assert "had not sent yet belongs to the mesh it was saved on, and was dropped" in note


class Normed(nn.Module):
    """Buffers that change, one that is not stored, and torch's own dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.register_buffer("turned", torch.randn(4, 6).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(self.linear(x)))


def test_buffers_and_torchs_own_random_numbers_go_on(tmp_path: Path) -> None:
    """On one rank: ranks that are threads share torch's generator."""

    def engine() -> Engine:
        return Engine([Normed(), nn.Linear(8, 4)], mean_loss(F.mse_loss), optimizer=AdamW(lr=0.01))

    first = engine()
    steps(first, 3)
    first.save(tmp_path / "middle")
    want = steps(first, 3)
    names = cases.canonical(tmp_path / "middle")
    assert {"fixed/0.norm.running_mean", "fixed/0.norm.num_batches_tracked", "fixed/0.turned"} <= set(names)
    assert "fixed/0.scratch" not in names
    second = engine()
    steps(second, 1)
    second.load(tmp_path / "middle")
    assert steps(second, 3) == want
    first.save(tmp_path / "end")
    second.save(tmp_path / "again")
    assert cases.canonical(tmp_path / "again", own=True) == cases.canonical(tmp_path / "end", own=True)


class Sometimes(nn.Module):
    """A parameter that has a gradient in every other step only."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.rare = nn.Linear(5, 4), nn.Linear(5, 4)
        self.turn = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.often(x) + (self.rare(x) if self.turn % 2 else 0)


def test_parameters_that_missed_updates_go_on_counting_their_own(tmp_path: Path) -> None:
    def run(engine: Engine, count: int) -> list[str]:
        out = []
        for _ in range(count):
            engine.modules[0].turn = engine.steps
            out += steps(engine, 1)
        return out

    def make_one(world: Group) -> Engine:
        torch.manual_seed(3)
        return Engine([Sometimes()], mean_loss(F.mse_loss), world=world, optimizer=AdamW(lr=0.01))

    def whole(world: Group) -> list[str]:
        engine = make_one(world)
        run(engine, 3)
        assert engine.state.missed
        engine.save(tmp_path / "middle")
        return run(engine, 3)

    def again(world: Group) -> list[str]:
        engine = make_one(world)
        engine.load(tmp_path / "middle")
        return run(engine, 3)

    assert run_threads(2, whole) == run_threads(2, again)
