"""Update rules on one GPU: the bits of element-wise rules are those of the CPU's native loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triloom.optim import SGD, Adafactor, AdamW, AdamW8bit, Hyper, Lion, Muon, Rule

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
