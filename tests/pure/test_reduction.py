"""Compressed gradients: what is sent, what is lost, and what it does to a loss curve."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from parity_cases import MODELS, batch
from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import ThreadsGroup, run_threads
from triloom.models import decoder
from triloom.optim import AdamW
from triloom.parallel.bucket import Flat
from triloom.parallel.reduction import REDUCTIONS, Cast, Exact, Quantized, Reduction, TopK
from triloom.placement import NAMED
from triloom.placement import REDUCTIONS as placement_names

N = 256


def contribution(rank: int, step: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(3 * N, generator=gen) * torch.logspace(-4, 1, 3 * N)[torch.randperm(3 * N, generator=gen)]


def total(step: int = 0) -> torch.Tensor:
    return sum((contribution(r, step).double() for r in range(3)), torch.zeros(3 * N, dtype=torch.float64))


def reduce(group: Group, rule: Reduction, steps: int = 1) -> torch.Tensor:
    memory: dict[str, torch.Tensor] = {}
    seen = torch.zeros(N)
    for step in range(steps):
        grads = contribution(group.rank, step)
        part = grads[group.rank * N : (group.rank + 1) * N]  # as the runtime does: a view of its input
        rule.post(group, part, grads, memory).wait()
        seen += part
    return seen


@pytest.mark.parametrize(
    "rule,bound",
    [(Exact(), 1e-6), (Cast(torch.bfloat16), 0.02), (Cast(torch.float16), 0.002), (TopK(1.0), 1e-6)],
)
def test_error_relative_to_the_sum_of_magnitudes(rule: Reduction, bound: float) -> None:
    got = torch.cat(run_threads(3, partial(reduce, rule=rule)))
    magnitude = sum(contribution(r).abs().double() for r in range(3))
    assert float(((got - total()).abs() / magnitude).max()) < bound


@pytest.mark.parametrize("block", [8, 64])
def test_quantised_error_is_half_a_unit_of_each_block(block: int) -> None:
    got = torch.cat(run_threads(3, partial(reduce, rule=Quantized(block))))
    unit = sum(contribution(r).view(-1, block).abs().amax(1).double() / 127 for r in range(3))
    assert bool(((got - total()).abs().view(-1, block) <= 0.51 * unit.unsqueeze(1)).all())


def test_error_feedback_loses_nothing() -> None:
    """What was not sent is still there: after many steps the sums differ by the last residuals only."""

    def run(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
        memory: dict[str, torch.Tensor] = {}
        seen = torch.zeros(N, dtype=torch.float64)
        for step in range(12):
            grads = contribution(group.rank, step)
            part = grads[group.rank * N : (group.rank + 1) * N]
            TopK(0.1).post(group, part, grads, memory).wait()
            seen += part
        return seen, memory["left"].double()

    results = run_threads(3, run)
    seen = torch.cat([r[0] for r in results])
    left = sum(r[1] for r in results)
    want = sum((total(step) for step in range(12)), torch.zeros(3 * N, dtype=torch.float64))
    torch.testing.assert_close(seen + left, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(name: str, value: float) -> None:
    def run(group: Group) -> bool:
        grads = contribution(group.rank)
        if group.rank == 1:
            grads[2 * N + 5] = value
        part = grads[group.rank * N : (group.rank + 1) * N]
        memory: dict[str, torch.Tensor] = {}
        REDUCTIONS[name]().post(group, part, grads, memory).wait()
        assert all(bool(t.isfinite().all()) for t in memory.values())
        return bool(part.isfinite().all())

    assert run_threads(3, run) == [True, True, False]


@pytest.mark.parametrize("name", REDUCTIONS)
def test_volume_is_what_is_sent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    for method in ("reduce_scatter", "all_to_all"):
        original = getattr(ThreadsGroup, method)

        def count(self, output, input, *args, original=original):  # type: ignore[no-untyped-def]
            if self.rank == 0:
                sent.append(input.nbytes * (self.size - 1) // self.size)
            return original(self, output, input, *args)

        monkeypatch.setattr(ThreadsGroup, method, count)
    rule = REDUCTIONS[name]()
    run_threads(3, partial(reduce, rule=rule))
    assert sum(sent) == pytest.approx(rule.volume(3 * N, 3), rel=0.02)


@pytest.mark.parametrize("placement", ["zero1", "zero3"])
def test_loss_curves(placement: str) -> None:
    """20 steps of a tiny Llama on one repeated batch: every rule learns; bf16 and 8 bits follow the exact curve."""

    def run(group: Group, rule: Reduction) -> list[float]:
        model = decoder(MODELS["llama"])
        engine = Engine(
            model.units, model.loss, world=group, reduction=rule, placement=NAMED[placement](), optimizer=AdamW(lr=0.01)
        )
        mine = [t.tensor_split(group.size)[group.rank] for t in batch(0)]
        return [engine.step(*mine).loss for _ in range(20)]

    curves = {name: run_threads(2, partial(run, rule=make()))[0] for name, make in REDUCTIONS.items()}
    exact = curves["exact"]
    assert exact[-1] < exact[0] - 1
    for name, distance in (("bfloat16", 0.02), ("int8", 0.05)):
        assert max(abs(a - b) for a, b in zip(curves[name], exact, strict=True)) < distance, name
    assert curves["topk"][-1] < exact[0] - 0.5


def test_padding_of_new_memory_reaches_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient buffer that is given memory anew may hold anything between the parameters."""
    provide = Flat.provide

    def dirty(self: Flat) -> torch.Tensor:
        if self.whole:
            return self.tensor
        return provide(self).fill_(1e30)

    def run(group: Group) -> list[float]:
        model = decoder(MODELS["llama"])
        engine = Engine(model.units, model.loss, world=group, reduction=Quantized(), placement=NAMED["zero2"]())
        mine = [t.tensor_split(group.size)[group.rank] for t in batch(0)]
        return [engine.step(*mine).loss for _ in range(4)]

    clean = run_threads(2, run)[0]
    monkeypatch.setattr(Flat, "provide", dirty)
    assert run_threads(2, run)[0] == clean


def test_every_rule_has_a_name_in_the_configuration() -> None:
    assert tuple(REDUCTIONS) == placement_names


def test_bad_numbers() -> None:
    with pytest.raises(ConfigError, match="block"):
        Quantized(48)
    with pytest.raises(ConfigError, match="fraction"):
        TopK(0.0)
