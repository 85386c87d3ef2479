"""Parameters without a gradient are left alone as torch leaves them alone, wherever the others had theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom.engine import Engine
from triloom.errors import TriloomError
from triloom.groups.base import Group as Ranks
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import SGD, Adafactor, AdamW, AdamW8bit, Group, Muon, Optimizer, TorchOptimizer
from triloom.parallel.build import mean_loss
from triloom.parallel.presence import Presence
from triloom.placement import NAMED, Placement, zero1, zero3

WIDTH, ROWS, MICRO, STEPS = 6, 8, 4, 6
"""Every step has MICRO microbatches of 2 rows, split over the dp ranks."""


class Switched(nn.Module):
    """Adds ``weight[k]`` to samples that ask for it: column k of the first columns of a microbatch's first row."""

    def __init__(self, shared: nn.Parameter, where: int) -> None:
        super().__init__()
        self.where = where
        self.shared = shared
        self.first = nn.Parameter(torch.full((WIDTH, WIDTH), 0.2, dtype=torch.float64))
        self.second = nn.Parameter(torch.full((3, WIDTH), 0.1, dtype=torch.float64))
        self.always = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.never = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, switches = both
        asked = switches[0].tolist()
        y = torch.tanh(x) * self.always
        if asked[self.where]:
            y = y + x @ self.first
        if asked[self.where + 1]:
            y = y * self.second.sum(0)
        if asked[-1 - self.where]:
            y = y @ self.shared
        return y, switches


class Out(nn.Module):
    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.shared = shared
        self.bias = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def forward(self, both: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, switches = both
        return (x @ self.shared.t() if switches[0, 4] else x) + self.bias


def units() -> list[nn.Module]:
    gen = torch.Generator().manual_seed(3)
    shared = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=gen, dtype=torch.float64) * 0.4)
    made: list[nn.Module] = [Switched(shared, 0), Switched(shared, 1), Switched(shared, 2), Out(shared)]
    return made


def batch(step: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """In step 1 nobody asks for anything, later every microbatch for something else, and for ever less."""
    gen = torch.Generator().manual_seed(50 + step)
    x, y = (torch.randn(ROWS, WIDTH, generator=gen, dtype=torch.float64) for _ in range(2))
    odds = (0.9, 0.0, 0.4, 0.15, 0.3, 0.6)[step]
    asked = torch.rand(MICRO, 5, generator=gen) < odds
    return (x, asked.repeat_interleave(ROWS // MICRO, 0).long()), y


@cache
def seen_patterns() -> int:
    """Every parameter has steps with a gradient and steps without one."""
    asked = [batch(s)[0][1].any(0) for s in range(STEPS)]
    table = torch.stack(asked)
    assert bool(table.any(0).all()) and not bool(table.all(0).any())
    return len(asked)


def train(ranks: Ranks, optimizer: Optimizer, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    mesh = make_mesh(ranks.size, **options.pop("mesh", {}))
    dp = mesh.axis("dp")
    engine = Engine(
        units(), mean_loss(F.mse_loss), world=ranks, mesh=mesh, optimizer=optimizer, microbatches=MICRO // dp,
        dtype=torch.float64, **options,
    )  # fmt: skip
    losses = []
    for step in range(STEPS):
        (x, asked), y = batch(step)
        mine = [t.tensor_split(dp)[engine.groups.axis("dp").rank] for t in (x, asked, y)]
        losses.append(engine.step((mine[0], mine[1]), mine[2]).loss)
    state = engine.full_state()
    engine.close()
    return losses, state


def plain(
    make: Callable[[list[nn.Parameter], list[nn.Parameter]], torch.optim.Optimizer],
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process, the microbatches one after the other."""
    model = nn.Sequential(*units())
    named = dict(model.named_parameters())
    matrices = [p for p in named.values() if p.ndim >= 2]
    optimizer = make(matrices, [p for p in named.values() if p.ndim < 2])
    losses = []
    for step in range(STEPS):
        (x, asked), y = batch(step)
        optimizer.zero_grad()
        total = 0.0
        for i in range(MICRO):
            part = slice(i * ROWS // MICRO, (i + 1) * ROWS // MICRO)
            loss = F.mse_loss(model((x[part], asked[part])), y[part]) / MICRO
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses, {k: p.detach() for k, p in named.items()}


def close(got: tuple[list[float], Mapping[str, torch.Tensor]], want: tuple[list[float], Any]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-9)
    for name, value in got[1].items():
        torch.testing.assert_close(value, want[1][name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


MESHES: list[tuple[int, dict[str, int]]] = [(1, {}), (2, {}), (4, {}), (2, {"pp": 2}), (4, {"pp": 2}), (4, {"tp": 2})]


def placements() -> list[Placement]:
    small = [NAMED[name]().with_(bucket_bytes=600) for name in NAMED]
    return [*small, zero1().with_(cadence="microbatch"), zero3().with_(cadence="step", keep=True)]


@pytest.mark.parametrize("ranks,mesh", MESHES)
def test_adamw_leaves_alone_what_torch_leaves_alone(ranks: int, mesh: dict[str, int]) -> None:
    assert seen_patterns() == STEPS
    rule = AdamW(lr=0.05, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)

    def make(matrices: list[nn.Parameter], vectors: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), eps=1e-4)

    want = plain(make)
    by_cadence: dict[str, Any] = {}
    for placement in placements():
        got = run_threads(ranks, partial(train, optimizer=rule, placement=placement, mesh=mesh))
        for one in got:
            close(one, want)
            first = by_cadence.setdefault(placement.cadence, one)
            assert one[0] == first[0] and all(torch.equal(one[1][k], first[1][k]) for k in first[1])


RULES: dict[str, Optimizer] = {
    "adafactor": Adafactor(lr=0.05, weight_decay=0.1),
    "muon": Muon(lr=0.05, match=lambda name, shape: "second" not in name),
    "adamw8bit": AdamW8bit(lr=0.05),
    "groups": AdamW(lr=0.05, groups=(Group(match=lambda name, shape: "first" in name, lr_scale=0.5),)),
    "nadam": TorchOptimizer(torch.optim.NAdam, lr=0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("name", RULES)
def test_every_rule_ends_in_the_same_bits_under_every_placement(name: str) -> None:
    want: Any = None
    for placement in placements()[:4]:
        for got in run_threads(2, partial(train, optimizer=RULES[name], placement=placement.with_(cadence="step"))):
            want = want or got
            assert got[0] == want[0] and all(torch.equal(got[1][k], want[1][k]) for k in want[1])
            assert torch.equal(got[1]["0.never"], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adamax, torch.optim.ASGD, torch.optim.RAdam])
def test_the_adapter_keeps_its_numbers_for_each_parameter(kind: Any) -> None:
    want = plain(lambda matrices, vectors: kind([*matrices, *vectors], lr=0.03))
    for ranks, placement in ((1, zero1()), (4, zero3().with_(bucket_bytes=600, cadence="step"))):
        for got in run_threads(ranks, partial(train, optimizer=TorchOptimizer(kind, lr=0.03), placement=placement)):
            close(got, want)


def test_steps_that_are_skipped_are_missed_by_nobody() -> None:
    engine = Engine(units(), mean_loss(F.mse_loss), dtype=torch.float64)
    (x, asked), y = batch(0)
    assert engine.step((x, asked), y).skipped is False
    missed = dict(engine.state.missed)
    assert engine.step((x * float("inf"), asked), y).skipped is True
    assert engine.state.missed == missed


def test_bits_of_ties_count_everywhere_others_at_their_coordinate() -> None:
    one = Presence(("a", "t", "b"), {"t": 1}, 2, (0, 2), 1)
    other = Presence(("c", "t"), {"t": 1}, 2, (1, 3), 1)
    rows = torch.stack([one.pack([True, False, False]), other.pack([False, True]), one.pack([False] * 3),
                        other.pack([False] * 2)])  # fmt: skip
    assert one.absent(rows) == {"b"} and other.absent(rows) == {"c"}
    assert one.absent(rows.roll(2, 0)) == {"b"}
    many = Presence(tuple(map(str, range(200))), {}, 0, (0,), 4)
    assert many.absent(many.pack([i != 130 for i in range(200)])[None]) == {"130"}


# ---------------------------------------------------------------- requires_grad that changes


def thaw(group: Ranks, placement: Placement, mesh: dict[str, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = chain()
    engine = Engine(
        made, mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, **mesh), placement=placement,
        optimizer=AdamW(lr=0.05, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3), microbatches=2, dtype=torch.float64,
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(STEPS):
        switch(made, step)
        (x, _), y = batch(step)
        losses.append(engine.step(*(t.tensor_split(dp.size)[dp.rank] for t in (x, y))).loss)
        if step == 3:
            engine.evaluate(x, y)
    state = engine.full_state()
    engine.close()
    return losses, state


def chain() -> list[nn.Module]:
    gen = torch.Generator().manual_seed(0)  # threads share the default one
    made: list[nn.Module] = [nn.Linear(WIDTH, WIDTH).double() for _ in range(3)]
    for m in made:
        for p in m.parameters():
            p.data.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.4)
    made[0].requires_grad_(False)
    return made


def switch(made: list[nn.Module], step: int) -> None:
    """The first layer is trained from step 2 on, the second is frozen in steps 1 to 3; all but a bias in step 4."""
    made[0].requires_grad_(step >= 2 and step != 4)
    made[1].requires_grad_(step not in (1, 2, 3, 4))
    made[2].weight.requires_grad_(step != 4)


@cache
def thawed() -> tuple[list[float], dict[str, torch.Tensor]]:
    model = nn.Sequential(*chain())
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.3},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9), eps=1e-4)
    losses = []
    for step in range(STEPS):
        switch(list(model), step)
        (x, _), y = batch(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {k: p.detach() for k, p in model.named_parameters()}


@pytest.mark.parametrize("ranks,mesh", [(1, {}), (2, {}), (2, {"pp": 2}), (4, {"pp": 2}), (2, {"tp": 2})])
def test_parameters_that_change_whether_they_are_trained(ranks: int, mesh: dict[str, int]) -> None:
    for name in NAMED:
        for got in run_threads(ranks, partial(thaw, placement=NAMED[name]().with_(bucket_bytes=300), mesh=mesh)):
            close(got, thawed())


def test_a_model_that_is_all_frozen_stays_as_it_is() -> None:
    made = chain()
    engine = Engine(made, mean_loss(F.mse_loss), world=Solo(), optimizer=SGD(lr=0.1))
    (x, _), y = batch(0)
    for m in made:
        m.requires_grad_(False)
    before = [p.clone() for m in made for p in m.parameters()]
    assert engine.step(x, y).grad_norm == 0
    assert all(torch.equal(p, q) for p, q in zip((p for m in made for p in m.parameters()), before, strict=True))


def test_other_stages_must_be_told_of_units_that_they_do_not_have() -> None:
    def run(group: Ranks) -> list[float]:
        engine = Engine(
            [lambda scope, i=i: chain()[i] for i in range(3)], mean_loss(F.mse_loss), world=group,
            mesh=make_mesh(2, pp=2), optimizer=AdamW(lr=0.05), dtype=torch.float64,
        )  # fmt: skip
        (x, _), y = batch(0)
        engine.step(x, y)
        for m in engine.modules.values():
            m.requires_grad_(True)
        if group.rank == 0:
            with pytest.raises(TriloomError, match=r"call engine.refresh\(\) on every rank"):
                engine.step(x, y)
        engine.refresh()
        before = engine.full_state()["0.weight"]
        engine.step(x, y)
        assert not torch.equal(engine.full_state()["0.weight"], before)
        return [engine.step(x, y).loss]

    run_threads(2, run)


def test_a_checkpoint_of_parameters_that_were_frozen_and_trained(tmp_path: Path) -> None:
    """One trained from step 1 on, one frozen from step 2 on: both have state, and have missed steps."""

    def run(group: Ranks, placement: Placement, save: bool) -> float:
        made = chain()[:2]
        made[0].requires_grad_(not save)
        engine = Engine(made, mean_loss(F.mse_loss), world=group, placement=placement, optimizer=AdamW(lr=0.1))
        (x, _), y = batch(0)
        if save:
            engine.step(x, y)
            made[0].requires_grad_(True)
            engine.step(x, y)
            made[1].requires_grad_(False)
            engine.step(x, y)
            engine.save(tmp_path)
        else:
            engine.load(tmp_path)
            made[1].requires_grad_(False)
        return engine.step(x, y).loss

    first = run_threads(2, partial(run, placement=NAMED["zero3"](), save=True))
    assert run_threads(2, partial(run, placement=NAMED["zero1"]().with_(cadence="microbatch"), save=False)) == first
