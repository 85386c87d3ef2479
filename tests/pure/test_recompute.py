"""Recomputation policies: the same bits as without, less memory, and errors where the bits could differ."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import triloom
from triloom.budget import cheapest, choose
from triloom.engine import Engine
from triloom.errors import ConfigError, TriloomError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import Placement, zero1, zero3
from triloom.scope import Scope
from triloom.tp import ColumnParallelLinear, Dropout

SEQ = 16
DROPPED = gpt2(vocab=61, hidden=24, layers=3, heads=4, max_seq=SEQ, dropout=0.2, attention_dropout=0.2)
POLICIES = {
    "selective": {"activations": "selective"},
    "recompute": {"activations": "recompute"},
    "budget": {"activations": "budget", "activation_bytes": 260_000},
}
Run = tuple[list[float], dict[str, Tensor], Engine]


def train(group: Group, placement: Placement, **how: Any) -> Run:
    model = decoder(DROPPED)
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=group, placement=placement, seed=5, microbatches=2, **how
    )
    ids = (torch.arange(6 * SEQ).view(6, SEQ) * 7) % 61
    share = ids.tensor_split(engine.groups.axis("dp").size)[engine.groups.axis("dp").rank]
    losses = [engine.step(share, share.roll(1, 1)).loss for _ in range(3)]
    return losses, engine.full_state(), engine


def same(one: Run, two: Run) -> None:
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], value) for name, value in two[1].items())


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_changes_a_bit_and_dropout_repeats(policy: str, schedule: str) -> None:
    kept = train(Solo(), zero1(), schedule=schedule)
    other = train(Solo(), zero1().with_(**POLICIES[policy]), schedule=schedule)
    same(other, kept)
    assert other[2].memory().peak["activations"] < 0.9 * kept[2].memory().peak["activations"]


def test_policies_compose_with_sharded_parameters_pipelines_and_tensor_parallelism() -> None:
    how = {"mesh": make_mesh(8, dp=2, pp=2, tp=2), "sequence_parallel": True, "schedule": "zb_h1"}
    kept = run_threads(8, partial(train, placement=zero3().with_(bucket_bytes=8000), **how))
    for columns in POLICIES.values():
        other = run_threads(8, partial(train, placement=zero3().with_(bucket_bytes=8000, **columns), **how))
        for one, two in zip(other, kept, strict=True):
            same(one, two)


def test_selective_saves_the_inside_of_attention() -> None:
    """Masked scores are not kept, softmax and probabilities are: 2 a s^2 b numbers a layer (arXiv 2205.05198)."""

    def peak(activations: str) -> int:
        engine = train(Solo(), zero1().with_(activations=activations))[2]
        return engine.memory().peak["activations"]

    inside = 4 * DROPPED.heads * SEQ * SEQ * 3 * DROPPED.layers  # bytes of one fp32 score tensor in all layers
    assert 2 * inside <= peak("keep") - peak("selective") <= 5 * inside


def test_a_budget_recomputes_no_more_than_it_must() -> None:
    kept = train(Solo(), zero1())[2].memory().peak["activations"]
    least = train(Solo(), zero1().with_(activations="recompute"))[2].memory().peak["activations"]
    budget = (kept + least) // 2
    engine = train(Solo(), zero1().with_(activations="budget", activation_bytes=budget))[2]
    assert 0 < len(engine._recomputed) < 4
    assert least < engine.memory().peak["activations"] <= budget
    generous = train(Solo(), zero1().with_(activations="budget", activation_bytes=kept))[2]
    assert not generous._recomputed
    with pytest.raises(ConfigError, match=r"activation_bytes = 1000 cannot be reached: .* still holds \d+ bytes"):
        train(Solo(), zero1().with_(activations="budget", activation_bytes=1000))


def test_a_budget_and_the_policy_come_together() -> None:
    with pytest.raises(ConfigError, match="a budget, and only a budget, needs activation_bytes"):
        zero1().with_(activations="budget")
    with pytest.raises(ConfigError, match="a budget, and only a budget, needs activation_bytes"):
        zero1().with_(activation_bytes=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), max_size=7), st.integers(1, 120))
def test_cheapest_is_the_least_cost_of_all_sets(items: list[tuple[int, int]], need: int) -> None:
    table = dict(enumerate(items))
    sets = [s for n in range(len(items) + 1) for s in combinations(table, n)]
    costs = [sum(table[k][1] for k in s) for s in sets if sum(table[k][0] for k in s) >= need]
    chosen = cheapest(table, need)
    if costs:
        assert sum(table[k][0] for k in chosen) >= need
        assert sum(table[k][1] for k in chosen) == min(costs)
    else:
        assert chosen == frozenset(table)


def test_choose_goes_on_until_the_peak_fits() -> None:
    """A recomputed unit is whole once, at its backward: recomputing one of two equal units saves nothing here."""
    items = {0: (10, 1), 1: (10, 1), 2: (10, 5)}

    def peak(recomputed: frozenset[int]) -> int:
        return 10 * (3 - len(recomputed)) + (10 if recomputed else 0)

    assert choose(peak, items, 30) == frozenset()
    assert choose(peak, items, 20) == frozenset({0, 1})
    assert choose(peak, items, 10) == frozenset({0, 1, 2})
    with pytest.raises(ConfigError, match="activation_bytes = 9 cannot be reached: .* holds 10 bytes"):
        choose(peak, items, 9)


# ---------------------------------------------------------------- a function inside a unit


class Wide(nn.Module):
    """A foreign module whose inside is recomputed or not; draws from torch's own generator."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.inside = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.3), nn.GELU(), nn.Linear(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + (triloom.recompute(self.inside, x) if self.again else self.inside(x))


def foreign(again: bool, schedule: str, **columns: Any) -> tuple[list[float], dict[str, Tensor], nn.Module, int]:
    torch.manual_seed(3)
    units = [Wide(again), Wide(again)]
    engine = Engine(
        units, mean_loss(F.mse_loss), schedule=schedule, microbatches=2, placement=zero1().with_(**columns),
        optimizer=AdamW(lr=0.05),
    )  # fmt: skip
    x = torch.linspace(-1, 1, 96).view(12, 8)
    losses = [engine.step(x, x.flip(1)).loss for _ in range(3)]
    return losses, engine.full_state(), units[0], engine.memory().peak["activations"]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_recompute_of_a_foreign_module_repeats_its_dropout_and_moves_statistics_once(schedule: str) -> None:
    losses, state, module, kept = foreign(False, schedule)
    for again, columns in ((True, {}), (False, {"activations": "recompute"}), (True, {"activations": "recompute"})):
        got = foreign(again, schedule, **columns)
        assert got[0] == losses
        assert all(torch.equal(got[1][n], v) for n, v in state.items())
        for (name, mine), other in zip(got[2].named_buffers(), module.buffers(), strict=True):
            assert torch.equal(mine, other), name
        assert got[3] < 0.7 * kept


class Own(nn.Module):
    """Own layers inside a closure: their dropout repeats only where the scope is as it was."""

    def __init__(self, scope: Scope, again: bool) -> None:
        super().__init__()
        self.scope, self.again = scope, again
        self.up = ColumnParallelLinear(8, 16, scope=scope, name="up")
        self.down = ColumnParallelLinear(16, 8, scope=scope, name="down")
        self.dropout = Dropout(0.4, scope=scope, site="inside")

    def forward(self, x: Tensor) -> Tensor:
        def inside(y: Tensor) -> Tensor:
            out: Tensor = self.down(self.dropout(torch.tanh(self.up(y))))
            return out

        return x + (triloom.recompute(inside, x, scope=self.scope) if self.again else inside(x))


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "gpipe"])
def test_recompute_of_own_layers_works_with_the_sink_and_the_counters(schedule: str) -> None:
    def run(again: bool) -> tuple[list[float], dict[str, Tensor]]:
        units = [lambda scope: Own(scope, again)] * 2
        engine = Engine(
            units, mean_loss(F.mse_loss), schedule=schedule, microbatches=3, optimizer=AdamW(lr=0.05), seed=4
        )
        x = torch.linspace(-1, 1, 6 * 5 * 8).view(6, 5, 8)
        return [engine.step(x, x.flip(0)).loss for _ in range(3)], engine.full_state()

    one, two = run(False), run(True)
    assert one[0] == two[0]
    assert all(torch.equal(one[1][n], two[1][n]) for n in one[1])


def test_recompute_without_an_engine_gives_gradients_as_usual() -> None:
    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).tanh().sum(), [x, *layer.parameters()])
    got = torch.autograd.grad(triloom.recompute(lambda y: layer(y).tanh(), x).sum(), [x, *layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        assert torch.equal(triloom.recompute(layer, x), layer(x))


# ---------------------------------------------------------------- in place


class InPlaceFirst(nn.Module):
    """Changes its input at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.mul_(2).tanh_())
        return out


def small(units: list[nn.Module], **columns: Any) -> tuple[list[float], dict[str, Tensor]]:
    engine = Engine(units, mean_loss(F.mse_loss), placement=zero1().with_(**columns), microbatches=2)
    x = torch.linspace(-1, 1, 16).view(4, 4)
    return [engine.step(x.clone(), x.flip(0)).loss for _ in range(2)], engine.full_state()


def test_an_in_place_first_operation_of_a_unit_works() -> None:
    def units() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Linear(4, 4), InPlaceFirst(), InPlaceFirst()]

    losses, state = small(units())
    again, other = small(units(), activations="recompute")
    assert losses == again and all(torch.equal(state[n], other[n]) for n in state)


def test_an_input_changed_after_its_use_is_an_error() -> None:
    class Remembers(nn.Module):
        """Changes, at its second microbatch, what it was given at its first."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen = nn.Linear(4, 4), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            for earlier in self.seen:
                earlier.add_(1)
            self.seen.append(x.detach())
            out: Tensor = self.linear(x)
            return out

    engine = Engine(
        [nn.Linear(4, 4), Remembers()], mean_loss(F.mse_loss), schedule="gpipe", microbatches=3,
        placement=zero1().with_(activations="recompute"),
    )  # fmt: skip
    with pytest.raises(TriloomError, match="input of a recomputed unit was changed in place after its forward"):
        for _ in range(2):
            engine.step(torch.ones(6, 4), torch.ones(6, 4))

    layer = nn.Linear(4, 4)
    x = torch.ones(2, 4, requires_grad=True) * 1
    y = triloom.recompute(layer, x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Sometimes(nn.Module):
    """Changes its input in place from its second forward on."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x.relu_() if self.forwards > 1 else x


def test_a_unit_that_changes_its_input_only_later_is_named() -> None:
    engine = Engine([nn.Linear(4, 4), Sometimes()], mean_loss(F.mse_loss), optimizer=AdamW())
    x = torch.ones(2, 4)
    engine.step(x, x)
    with pytest.raises(TriloomError, match="Sometimes. changes its input in place now"):
        engine.step(x, x)


def test_hooks_on_what_a_unit_is_given_work_in_every_step() -> None:
    engine = Engine([nn.Linear(4, 4), nn.Linear(4, 4)], mean_loss(F.mse_loss), optimizer=AdamW())
    x = torch.ones(2, 4)
    counts = []
    for _ in range(3):
        with FlopCounterMode(display=False) as counter:  # hooks every module's inputs
            engine.step(x, x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0
