"""Update rules on one GPU: the bits of element-wise rules are those of the CPU's native loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from triloom.engine import Engine
from triloom.optim import SGD, Adafactor, AdamW, AdamW8bit, Hyper, Lion, Muon, Rule
from triloom.parallel.build import mean_loss
from triloom.placement import State, zero1
from triloom.rounding import round_stochastic_

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

N = 64 * 1000


def updated(rule: Rule, device: str, shape: tuple[int, ...], **dtypes: Any) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    draw = lambda dtype: torch.randn(shape, generator=gen).to(device, dtype)  # noqa: E731
    param = draw(torch.float32)
    states = {k: torch.zeros(s.shape, dtype=s.dtype, device=device) for k, s in rule.states(shape, param.dtype).items()}
    low = None if dtypes["low"] is None else torch.zeros(shape, dtype=dtypes["low"], device=device)
    for step in (1, 2, 3):
        hyper = Hyper(lr=0.03, step=step, weight_decay=0.1, grad_scale=0.37)
        rule.update(param, draw(dtypes["grad"]), states, hyper, low)
    out = {"param": param, **states} | ({} if low is None else {"low": low})
    return {k: v.cpu() for k, v in out.items()}


@pytest.mark.parametrize("rule", [AdamW(), AdamW8bit(), SGD(nesterov=True), SGD(momentum=0.0), Lion()], ids=str)
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_element_wise_rules_give_the_bits_of_the_cpu(rule: Rule, low: torch.dtype | None) -> None:
    options = {"grad": low or torch.float32, "low": low}
    here, there = (updated(rule, device, (N,), **options) for device in ("cpu", "cuda"))
    for name, value in here.items():
        assert torch.equal(value, there[name]), name


@pytest.mark.parametrize("rule", [Muon(), Adafactor()], ids=str)
def test_whole_tensor_rules_agree_with_the_cpu(rule: Rule) -> None:
    options = {"grad": torch.float32, "low": None}
    here, there = (updated(rule, device, (96, 160), **options) for device in ("cpu", "cuda"))
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-5)


def test_rounding_by_chance_draws_alike() -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(1))
    values[:3] = torch.tensor([float("inf"), -float("inf"), 0.0])
    here = round_stochastic_(torch.empty(70_001, dtype=torch.bfloat16), values, 9, 5, (1,))
    there = round_stochastic_(torch.empty(70_001, dtype=torch.bfloat16, device="cuda"), values.cuda(), 9, 5, (1,))
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_updates_without_masters_give_the_bits_of_the_cpu(rounding: str) -> None:
    """Gradients that are the same on both: the sum of a product with the input."""

    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        unit = nn.Linear(64, 64, bias=False).bfloat16().to(device)
        placement = zero1().with_(rounding=rounding, optimizer=State(sharded=True, dtype="bfloat16"))
        engine = Engine([unit], mean_loss(lambda y, t: y.float().sum()), placement=placement, clip=None,
                        optimizer=AdamW(lr=0.01), device=torch.device(device), dtype=torch.bfloat16)  # fmt: skip
        for _ in range(3):
            engine.step(torch.ones(1, 64, dtype=torch.bfloat16, device=device), torch.zeros(1, device=device))
        return engine.full_state()["0.weight"].cpu()

    assert torch.equal(run("cuda"), run("cpu"))
