"""ZeRO stages on every small mesh, under three schedules and both cadences: the same bits. Ranks are threads."""

from __future__ import annotations

from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity_cases import MODELS, batch
from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import NAMED, Placement, zero3

STEPS = 5


class Case(NamedTuple):
    dp: int
    pp: int
    tp: int
    schedule: str
    cadence: str
    microbatches: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


Result = tuple[list[float], list[float], dict[str, torch.Tensor]]
"""Losses, norms; at the end the parameters and both moments."""


def train(group: Group, case: Case, placement: Placement, dtype: torch.dtype = torch.float32) -> Result:
    model = decoder(MODELS["llama_gqa_tied"])
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=group, seed=11, clip=0.7, dtype=dtype, schedule=case.schedule,
        mesh=make_mesh(group.size, dp=case.dp, pp=case.pp, tp=case.tp), microbatches=case.microbatches,
        placement=placement.with_(cadence=case.cadence, bucket_bytes=4096), optimizer=AdamW(lr=0.01, eps=1e-4),
    )  # fmt: skip
    rank = engine.groups.axis("dp").rank
    metrics = [engine.step(*(t.tensor_split(case.dp)[rank] for t in batch(step))) for step in range(STEPS)]
    kinds = ("params", "exp_avg", "exp_avg_sq")
    state = {f"{kind}/{n}": t for kind in kinds for n, t in engine.full_state(kind).items()}
    engine.close()
    return [m.loss for m in metrics], [m.grad_norm for m in metrics], state


def every_case() -> list[Case]:
    axes = product((1, 2, 3, 4), (1, 2), (1, 2), ("1f1b", "zb_h1", "interleaved"), ("step", "microbatch"), (1, 3))
    cases = [Case(*values) for values in axes]
    meaningful = [c for c in cases if c.pp > 1 or c.schedule == "1f1b"]
    return [
        c for c in meaningful if c.dp * c.pp * c.tp <= 6 and not (c.schedule == "interleaved" and c.microbatches % 2)
    ]


def cover() -> list[Case]:
    return [
        Case(2, 2, 1, "zb_h1", "microbatch", 3),
        Case(1, 2, 2, "interleaved", "step", 2),
        Case(3, 1, 2, "1f1b", "step", 2),
        Case(4, 1, 1, "1f1b", "microbatch", 3),
        Case(1, 2, 1, "interleaved", "step", 4),
        Case(1, 1, 1, "1f1b", "step", 3),
    ]


@cache
def alone(microbatches: int, cadence: str) -> Result:
    return train(Solo(), Case(1, 1, 1, "1f1b", cadence, microbatches), NAMED["zero0"]())


def check(case: Case) -> None:
    want: Any = None
    for name in NAMED:
        for got in run_threads(case.dp * case.pp * case.tp, partial(train, case=case, placement=NAMED[name]())):
            want = want or got
            same(got, want)
    one = alone(case.microbatches, case.cadence)
    if (case.dp, case.tp) == (1, 1):
        same(want, one)
    elif case.dp == 1:
        assert want[0] == pytest.approx(one[0], rel=1e-4)


def same(got: Result, want: Result) -> None:
    assert got[:2] == want[:2] and got[2].keys() == want[2].keys()
    for name, value in want[2].items():
        assert torch.equal(got[2][name], value), name


@pytest.mark.parametrize("case", cover(), ids=str)
def test_stages_agree_bit_for_bit_and_with_one_process(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", every_case(), ids=str)
def test_full_product_of_stages(case: Case) -> None:
    check(case)


# ---------------------------------------------------------------- a hundred small layers


def hundred() -> list[nn.Module]:
    gen = torch.Generator().manual_seed(1)
    made: list[nn.Module] = [nn.Linear(3, 3).double() for _ in range(100)]
    for m in made:
        for p in m.parameters():
            p.data.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.6)
    return made


def small(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(step)
    return torch.randn(8, 3, generator=gen, dtype=torch.float64), torch.randn(8, 3, generator=gen, dtype=torch.float64)


def test_a_hundred_small_layers_are_torch_adamw() -> None:
    """Each a unit of its own, of twelve numbers, under every stage, in small buckets and in one."""
    rule: dict[str, Any] = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3}
    model = nn.Sequential(*hundred())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1},
         {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], **rule,
    )  # fmt: skip
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(model(small(step)[0]), small(step)[1])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    def run(group: Group, placement: Placement) -> tuple[list[float], dict[str, torch.Tensor]]:
        engine = Engine(hundred(), mean_loss(F.mse_loss), world=group, placement=placement, dtype=torch.float64,
                        optimizer=AdamW(**rule))  # fmt: skip
        got = [engine.step(*(t.tensor_split(2)[group.rank] for t in small(step))).loss for step in range(3)]
        return got, engine.full_state()

    for row in (NAMED["zero1"](), NAMED["zero2"]().with_(bucket_bytes=300), zero3().with_(bucket_bytes=2000), zero3()):
        for got, state in run_threads(2, partial(run, placement=row)):
            assert got == pytest.approx(losses, rel=1e-9)
            for name, p in model.named_parameters():
                torch.testing.assert_close(state[name], p.detach(), rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------- state_dict, two engines


def test_state_dict_of_a_unit_inside_gathered() -> None:
    def run(group: Group) -> None:
        engine = Engine([nn.Linear(8, 8), nn.Linear(8, 8)], mean_loss(F.mse_loss), world=group, placement=zero3())
        x = torch.ones(2, 8)
        engine.step(x, x)
        with engine.gathered():
            taken = {f"{u}.{n}": t.clone() for u, m in engine.modules.items() for n, t in m.state_dict().items()}
        whole = engine.full_state()
        assert taken.keys() == whole.keys() and all(torch.equal(taken[n], whole[n]) for n in whole)
        with engine.gathered():
            engine.modules[1].load_state_dict({"weight": torch.eye(8), "bias": torch.zeros(8)})
        engine.step(x, x)
        moved = engine.full_state()["1.weight"] - torch.eye(8)
        assert 0 < float(moved.abs().max()) < 0.1

    run_threads(2, run)


def test_two_engines_of_different_stages_take_turns() -> None:
    def run(group: Group) -> None:
        made = [NAMED["zero1"](), zero3()]
        engines = [
            Engine(hundred()[:6], mean_loss(F.mse_loss), world=group, placement=p.with_(cadence="step")) for p in made
        ]
        for step in range(3):
            mine = [t.tensor_split(2)[group.rank] for t in small(step)]
            first, second = (e.step(*mine).loss for e in engines)
            assert first == second
        one, two = (e.full_state() for e in engines)
        assert all(torch.equal(one[name], two[name]) for name in one)

    run_threads(2, run)
