"""Optimizers of torch.optim on flat shards against the real ones on whole parameters."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from optim_cases import ROWS, STEPS, data, train, units
from triloom.errors import ConfigError
from triloom.groups.threads import run_threads
from triloom.optim import Group, TorchOptimizer, constant, matrices
from triloom.placement import zero1

ELEMENTWISE: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd with dampening": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "adam with amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.02}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.05}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.5}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.05}),
}


def real(factory: Any, options: dict[str, Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = nn.Sequential(*copy.deepcopy(units()))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = factory(trained, **options)
    losses = []
    for step in range(STEPS):
        x, y = data(step)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_adapter_is_the_real_optimizer(name: str) -> None:
    factory, options = ELEMENTWISE[name]
    losses, params = real(factory, options)
    rule = TorchOptimizer(factory, **options)
    for ranks, placement in ((1, zero1()), (3, ROWS[0]), (3, ROWS[3])):
        for outcome in run_threads(ranks, partial(train, optimizer=rule, clip=None, placement=placement)):
            assert outcome.losses == pytest.approx(losses, rel=1e-8)
            for key, value in params.items():
                torch.testing.assert_close(outcome.params[key], value, rtol=1e-7, atol=1e-9)


def test_states_live_in_the_flat_layout_with_lr_schedules_and_groups() -> None:
    rule = TorchOptimizer(
        torch.optim.AdamW, lr=constant(0.01, warmup=2), weight_decay=0.1, decay=matrices,
        groups=(Group(match=lambda name, shape: "bias" in name, lr_scale=0.0),),
    )  # fmt: skip
    before = {f"{i}.{n}": p.detach().clone() for i, m in enumerate(units()) for n, p in m.named_parameters()}
    (one,) = run_threads(1, partial(train, optimizer=rule, states=("exp_avg",)))
    for other in run_threads(2, partial(train, optimizer=rule, states=("exp_avg",))):
        torch.testing.assert_close(other.states["exp_avg"], one.states["exp_avg"])
    assert one.states["exp_avg"]["2.bias"].abs().sum() > 0
    assert torch.equal(one.params["2.bias"], before["2.bias"])
    assert not torch.equal(one.params["2.weight"], before["2.weight"])
    for outcome in run_threads(3, partial(train, optimizer=rule, states=("step",), placement=ROWS[2])):
        assert {float(t) for n, t in outcome.states["step"].items() if n != "1.unused"} == {float(STEPS)}
        assert float(outcome.states["step"]["1.unused"]) == 0


class Normed(torch.optim.Optimizer):
    """A step of unit length: not element-wise."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm(), alpha=group["lr"])


class Rows(Normed):
    """Keeps a state that is neither one number an element nor one in all."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["halves"] = p.grad.view(2, -1).sum(0)
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize(
    "factory,message",
    [
        (torch.optim.LBFGS, "LBFGS is not element-wise: it evaluates the loss several times"),
        (torch.optim.Adafactor, "use triloom.optim.Adafactor"),
        (torch.optim.Muon, "use triloom.optim.Muon"),
        (torch.optim.SparseAdam, "sparse gradients"),
        (Normed, "Normed is not element-wise: it updates the halves of a vector otherwise.*reach=None"),
    ],
)
def test_what_is_not_element_wise_is_refused(factory: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchOptimizer(factory, lr=0.1)


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Rows keeps 'halves' as shape \(32,\)"):
        run_threads(1, partial(train, optimizer=TorchOptimizer(Rows, lr=0.1)))
