"""The engine against a plain PyTorch loop, on ranks as threads, with a user's own modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom.engine import Engine, Metrics
from triloom.errors import TriloomError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import zero0, zero1, zero2, zero3

STEPS, BATCH, WIDTH = 4, 12, 7
RULE = AdamW(lr=0.05, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1)


PLACEMENTS = (
    zero0(),
    zero1().with_(bucket_bytes=200),
    zero2().with_(bucket_bytes=200),
    zero3().with_(bucket_bytes=200, prefetch=2),
    zero3().with_(bucket_bytes=400, activations="recompute", prefetch=0),
)


class InPlace(nn.Module):
    """A unit whose first operation changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.lin(x.relu_())) + x


def units() -> list[nn.Module]:
    gen = torch.Generator().manual_seed(3)
    made: list[nn.Module] = [nn.Linear(5, WIDTH), InPlace(), nn.Linear(WIDTH, WIDTH), InPlace(), nn.Linear(WIDTH, 3)]
    with torch.no_grad():
        for m in made:
            m.double()
            for p in m.parameters():
                p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.4)
    return made


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(BATCH, n, generator=gen, dtype=torch.float64) for n in (5, 3))
    return x, y


def plain(made: Sequence[nn.Module], clip: float) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    model = nn.Sequential(*copy.deepcopy(list(made)))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    opt = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.05, betas=(0.9, 0.99), eps=1e-3,
    )  # fmt: skip
    losses, norms = [], []
    for step in range(STEPS):
        x, y = data(step)
        loss = F.mse_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
        losses.append(float(loss.detach()))
    return losses, norms, {k: v.detach() for k, v in model.named_parameters()}


def train(group: Group, clip: float = 0.5, **options: object) -> tuple[list[Metrics], dict[str, torch.Tensor]]:
    mesh = make_mesh(group.size, **options.pop("mesh", {}))  # type: ignore[arg-type]
    engine = Engine(units(), mean_loss(F.mse_loss), world=group, mesh=mesh, optimizer=RULE, clip=clip, **options)  # type: ignore[arg-type]
    dp = engine.groups.axis("dp")
    out = []
    for step in range(STEPS):
        x, y = data(step)
        share = BATCH // dp.size
        mine = slice(dp.rank * share, (dp.rank + 1) * share)
        out.append(engine.step(x[mine], y[mine]))
    return out, engine.full_state()


@pytest.mark.parametrize(
    "ranks,mesh", [(1, {}), (2, {}), (3, {}), (2, {"pp": 2}), (3, {"pp": 3}), (4, {"pp": 2}), (6, {"pp": 3})]
)
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_equals_plain_loop(ranks: int, mesh: dict[str, int], schedule: str, microbatches: int) -> None:
    losses, norms, params = plain(units(), 0.5)
    for placement in PLACEMENTS:
        results = run_threads(
            ranks, partial(train, mesh=mesh, schedule=schedule, microbatches=microbatches, placement=placement)
        )
        for metrics, state in results:
            assert [m.loss for m in metrics] == pytest.approx(losses, rel=1e-12)
            assert [m.grad_norm for m in metrics] == pytest.approx(norms, rel=1e-12)
            assert state.keys() == params.keys()
            for name, p in params.items():
                torch.testing.assert_close(state[name], p, rtol=1e-11, atol=1e-12)


ROWS = (zero0, zero1, zero2, zero3)


@pytest.mark.parametrize("cadence", ["step", "microbatch"])
def test_placement_and_schedule_do_not_change_a_bit(cadence: str) -> None:
    placements = [row().with_(cadence=cadence, bucket_bytes=size) for row in ROWS for size in (100, 1 << 20)]
    placements += [p.with_(activations="recompute", keep=True, prefetch=3) for p in placements[::3]]
    runs = [
        run_threads(4, partial(train, mesh={"pp": 2}, schedule=s, microbatches=3, placement=p))
        for s in ("1f1b", "gpipe", "zb_h1")
        for p in placements
    ]
    first = runs[0]
    for run in runs[1:]:
        for (metrics, state), (metrics0, state0) in zip(run, first, strict=True):
            assert metrics == metrics0
            assert all(torch.equal(state[n], state0[n]) for n in state0)


def test_sharded_parameters_are_refused_between_uses_and_gathered_on_request() -> None:
    def run(group: Group) -> None:
        made = units()
        engine = Engine(made, mean_loss(F.mse_loss), world=group, optimizer=RULE, placement=zero3())
        expected = engine.full_state()
        padded, held = 8 * sum(b.bucket.numel for b in engine.state.buckets), engine.memory().present
        assert held["moments"] == 2 * held["params"] and held["gathered"] == 0
        assert 4 * padded == group.size * (held["params"] + held["grads"] + held["moments"] + held["padding"])
        with pytest.raises(TriloomError, match=r"0\.weight is sharded .* engine\.gathered"):
            made[0].weight.sum()
        with pytest.raises(TriloomError, match="sharded"):
            made[0](torch.zeros(1, 5, dtype=torch.float64))
        with engine.gathered(), torch.no_grad():
            assert torch.equal(made[0].weight, expected["0.weight"])
            made[0].weight.mul_(2)
        assert torch.equal(engine.full_state()["0.weight"], 2 * expected["0.weight"])
        engine.step(*data(0))

    run_threads(3, run)
