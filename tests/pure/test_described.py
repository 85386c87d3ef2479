"""What two processes compare of a configuration: values and what functions compute from, never addresses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from triloom.described import describe
from triloom.engine import Engine
from triloom.errors import MismatchError
from triloom.groups.base import Group as Ranks
from triloom.groups.threads import run_threads
from triloom.optim import SGD, AdamW, Group, Muon, Optimizer, TorchOptimizer, warmup_cosine, wsd
from triloom.optim.rates import constant
from triloom.parallel.build import mean_loss


class Plain:
    """Has no repr of its own."""

    def __init__(self, peak: float) -> None:
        self.peak = peak

    def __call__(self, step: int) -> float:
        return self.peak


def embeddings(scale: float) -> Group:
    return Group(match=lambda name, shape: "embed" in name, lr_scale=scale)


DIFFERENT: list[tuple[Any, Any]] = [
    (AdamW(lr=1e-3), AdamW(lr=2e-3)),
    (AdamW(lr=1e-3), AdamW(lr=1e-3, betas=(0.9, 0.98))),
    (AdamW(lr=1e-3), AdamW(lr=1e-3, weight_decay=0.5)),
    (AdamW(lr=1e-3), SGD(lr=1e-3)),
    (AdamW(lr=warmup_cosine(1e-3, warmup=2, steps=9)), AdamW(lr=warmup_cosine(1e-3, warmup=3, steps=9))),
    (AdamW(lr=constant(1e-3)), AdamW(lr=wsd(1e-3, warmup=0, steps=9, cooldown=0))),
    (AdamW(lr=lambda step: 1e-3), AdamW(lr=lambda step: 2e-3)),
    (AdamW(lr=Plain(1.0)), AdamW(lr=Plain(2.0))),
    (AdamW(lr=Plain(1.0).__call__), AdamW(lr=Plain(2.0).__call__)),
    (AdamW(lr=partial(max, 1)), AdamW(lr=partial(max, 2))),
    (AdamW(groups=(embeddings(0.5),)), AdamW(groups=(embeddings(0.25),))),
    (AdamW(groups=(Group(match=lambda n, s: "a" in n),)), AdamW(groups=(Group(match=lambda n, s: "b" in n),))),
    (TorchOptimizer(torch.optim.NAdam, lr=1e-3), TorchOptimizer(torch.optim.RAdam, lr=1e-3)),
    (TorchOptimizer(torch.optim.NAdam, lr=1e-3), TorchOptimizer(torch.optim.NAdam, lr=1e-3, betas=(0.8, 0.9))),
    (Muon(lr=1e-3), Muon(lr=1e-3, groups=(embeddings(1.0),))),
    (torch.float32, torch.float16),
    ({"a": 1.0}, {"a": 1.5}),
    ({1, 2}, {1, 3}),
    (0.1, 0.1 + 1e-17 + 2e-17),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=[str(i) for i in range(len(DIFFERENT))])
def test_what_differs_is_told_apart(one: Any, other: Any) -> None:
    assert describe(one) == describe(one)
    assert describe(one) != describe(other)
    assert "0x7" not in json.dumps(describe(one))  # an address of a 64-bit process


def test_the_same_line_twice_is_the_same() -> None:
    def made() -> Optimizer:
        return AdamW(lr=warmup_cosine(0.1, warmup=2, steps=8), decay=lambda n, s: len(s) > 1, groups=(embeddings(0.5),))

    assert describe(made()) == describe(made())
    assert describe(Plain(1.0)) == describe(Plain(1.0)) != describe(Plain(1.5))
    assert describe(object()) == describe(object())


def test_what_holds_itself_ends() -> None:
    """A recursive function, and a schedule that captured the program around it, engine and all."""

    def made(peak: float) -> Any:
        def lr(step: int) -> float:
            return peak if step == 0 else lr(step - 1) / 2

        return lr

    assert describe(made(1.0)) == describe(made(1.0)) != describe(made(2.0))

    class Trainer:
        def __init__(self, peak: float) -> None:
            self.peak = peak
            self.model = torch.nn.Linear(4, 4)
            self.optimizer = AdamW(lr=lambda step: self.peak)

    one, two, other = Trainer(1.0), Trainer(1.0), Trainer(2.0)
    assert describe(one.optimizer) == describe(two.optimizer) != describe(other.optimizer)
    values: list[Any] = [1]
    values.append(values)
    assert describe(values) == [1, "..."]
    late: int  # assigned below
    unassigned = [lambda: late for _ in range(2)]
    assert describe(unassigned[0]) == describe(unassigned[1])
    late = 1
    assert describe(unassigned[0]) != describe(lambda: 1) and unassigned[0]() == late


def test_another_process_says_the_same() -> None:
    program = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import json, test_described as t\n"
        "from triloom.described import describe\n"
        "print(json.dumps([describe(pair) for pair in t.DIFFERENT]))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True).stdout
    here = json.dumps([describe(pair) for pair in DIFFERENT]).replace(f'"{__name__}.', '"test_described.')
    assert json.loads(out) == json.loads(here)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A rate as a dataclass."""

    peak: float

    def __call__(self, step: int) -> float:
        return self.peak


def test_ranks_with_different_optimizers_are_refused_before_the_first_step() -> None:
    def rank(group: Ranks, optimizer: Optimizer) -> None:
        units = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        Engine(units, mean_loss(torch.nn.functional.mse_loss), world=group, optimizer=optimizer).close()

    base = AdamW(lr=Schedule(peak=1e-3))
    run_threads(2, lambda group: rank(group, replace(base, lr=Schedule(peak=1e-3))))
    for other in (replace(base, lr=Schedule(peak=2e-3)), replace(base, eps=1e-6), replace(base, lr=lambda step: 1e-3)):
        with pytest.raises(MismatchError, match=r"disagree on the engine's configuration.*rank 0: .*AdamW"):
            run_threads(2, lambda group, other=other: rank(group, other if group.rank else base))  # type: ignore[misc]
