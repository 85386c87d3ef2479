"""A small model with awkward parameters, and the plain loop that a rule must agree with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.mesh import make_mesh
from triloom.optim import Hyper, Optimizer
from triloom.parallel.build import mean_loss
from triloom.placement import zero0, zero1, zero2, zero3

WIDTH, BATCH, STEPS = 9, 12, 4
CLIP = 0.5

ROWS = (zero0(), zero1(), zero2().with_(bucket_bytes=400), zero3().with_(bucket_bytes=900, prefetch=2))


class Odd(nn.Module):
    """Frozen, zero-sized and one-element parameters, a vector that is never used, a 3-d tensor and a tied matrix."""

    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.shared = shared
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5, dtype=shared.dtype), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3, dtype=shared.dtype))
        self.empty = nn.Parameter(torch.zeros(0, 4, dtype=shared.dtype))
        self.scalar = nn.Parameter(torch.tensor(0.7, dtype=shared.dtype))
        self.one = nn.Parameter(torch.full((1, 1), 0.3, dtype=shared.dtype))
        self.cube = nn.Parameter(torch.zeros(2, 3, WIDTH, dtype=shared.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(x @ self.shared) * self.scalar + self.frozen + self.empty.sum()
        return mixed + self.cube.sum((0, 1)) * self.one


class Out(nn.Module):
    def __init__(self, shared: nn.Parameter) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.shared.t())[:, :4]


def units(dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    gen = torch.Generator().manual_seed(5)
    shared = nn.Parameter(torch.zeros(WIDTH, WIDTH, dtype=dtype))
    made = [nn.Linear(5, WIDTH), Odd(shared), nn.Linear(WIDTH, 17), nn.Linear(17, WIDTH, bias=False), Out(shared)]
    for m in made:
        m.to(dtype)
        for p in m.parameters():
            if p.requires_grad and p.numel() > 1:
                p.data.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.4)
    made[4].shared = made[1].shared  # type: ignore[assignment]  # .to() keeps the object, whatever it did
    return made


def data(step: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(BATCH, n, generator=gen, dtype=torch.float64).to(dtype) for n in (5, 4))
    return x, y


@dataclass
class Outcome:
    losses: list[float]
    params: dict[str, torch.Tensor]
    states: dict[str, dict[str, torch.Tensor]]


def train(
    group: Group, optimizer: Optimizer, states: Sequence[str] = (), dtype: torch.dtype = torch.float64, **options: Any
) -> Outcome:
    options = {"clip": CLIP, "microbatches": 2, **options}
    mesh = make_mesh(group.size, **options.pop("mesh", {}))
    engine = Engine(units(dtype), mean_loss(F.mse_loss), world=group, mesh=mesh, optimizer=optimizer, dtype=dtype,
                    **options)  # fmt: skip
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(STEPS):
        x, y = (t.tensor_split(dp.size)[dp.rank] for t in data(step, dtype))
        losses.append(engine.step(x, y).loss)
    gathered = {kind: engine.full_state(kind) for kind in states}
    return Outcome(losses, engine.full_state(), gathered)


def same_bits(got: Outcome, want: Outcome) -> None:
    assert got.losses == want.losses
    pairs = [(got.params, want.params), *((got.states[k], want.states[k]) for k in want.states)]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(ours[name], value), name


def plain(optimizer: Optimizer) -> Outcome:
    """The same training in a plain loop, each parameter updated by its rule as a whole."""
    model = nn.Sequential(*copy.deepcopy(units()))
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kept: dict[str, dict[str, torch.Tensor]] = {}
    losses = []
    for step in range(STEPS):
        x, y = data(step)
        model.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None]))
        for name, p in named.items():
            t = optimizer.treatment(name, tuple(p.shape))
            if p.numel() and p.grad is not None:
                hyper = Hyper(
                    lr=t.rate(step), step=step + 1, weight_decay=t.weight_decay, grad_scale=min(1, CLIP / (norm + 1e-6))
                )
                _update(t.rule, p, kept.setdefault(name, {}), hyper)
        losses.append(float(loss.detach()))
    return Outcome(losses, {n: p.detach() for n, p in named.items()}, {})


def _update(rule: Any, p: nn.Parameter, states: dict[str, torch.Tensor], hyper: Hyper) -> None:
    assert p.grad is not None
    flat, g = p.detach(), p.grad
    if rule.reach is not None:  # flat, padded as in a bucket
        flat = F.pad(p.detach().reshape(-1), (0, -p.numel() % 64))
        g = F.pad(p.grad.reshape(-1), (0, -p.numel() % 64))
    if not states:
        specs = rule.states(tuple(flat.shape), flat.dtype)
        states.update({k: torch.zeros(s.shape, dtype=s.dtype) for k, s in specs.items()})
    rule.update(flat, g, states, hyper, None)
    if rule.reach is not None:
        p.data.copy_(flat[: p.numel()].view(p.shape))
