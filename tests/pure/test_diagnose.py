"""A training that stops being finite says which unit did it, on every rank, and can go on if it is let."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triloom.engine import Engine
from triloom.errors import DivergedError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder, llama
from triloom.parallel.build import mean_loss
from triloom.placement import NAMED
from triloom.scaling import fixed

WIDTH = 4


class Blow(nn.Module):
    """Leaves the range of fp32 for inputs above 1."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(100 * x.abs().amax() * 0.9 * (x.abs().amax() > 1)) * x


class Root(nn.Module):
    """Finite at 0, but its derivative is not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x * 0).abs().sqrt() * self.scale


def build(group: Group, middle: nn.Module, placement: str, pp: int) -> Engine:
    torch.manual_seed(0)
    units = {"first": nn.Linear(WIDTH, WIDTH), "middle": middle, "last": nn.Linear(WIDTH, WIDTH)}
    return Engine(
        units, mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=pp), microbatches=2,
        placement=NAMED[placement](), scaling=fixed(max_skips=0),
    )  # fmt: skip


def message(engine: Engine, x: Tensor) -> str:
    with pytest.raises(DivergedError) as raised:
        engine.step(x, torch.zeros(4, WIDTH))
    return str(raised.value)


@pytest.mark.parametrize("placement", ["zero1", "zero3"])
@pytest.mark.parametrize(("ranks", "pp"), [(1, 1), (2, 1), (3, 3), (4, 2)])
def test_the_unit_and_its_reason_are_named_on_every_rank(ranks: int, pp: int, placement: str) -> None:
    good = torch.full((4, WIDTH), 0.1)

    def overflow(group: Group) -> str:
        engine = build(group, Blow(), placement, pp)
        last = group.rank // pp == ranks // pp - 1
        text = message(engine, good.index_fill(0, torch.tensor(3), 50.0) if last else good)
        assert math.isfinite(engine.step(good, torch.zeros(4, WIDTH)).loss) and engine.steps == 1
        return text

    def weights(group: Group) -> str:
        engine = build(group, nn.Linear(WIDTH, WIDTH), placement, pp)
        with engine.gathered():
            if 1 in engine.modules:
                engine.modules[1].weight.data[0, 0] = math.nan  # type: ignore[index, union-attr]
        return message(engine, good)

    def data(group: Group) -> str:
        engine = build(group, nn.Linear(WIDTH, WIDTH), placement, pp)
        return message(engine, good.index_fill(0, torch.tensor(0), math.inf))

    def backward(group: Group) -> str:
        return message(build(group, Root(), placement, pp), good)

    holder = "ranks? [0-9, ]+"
    for body, what in (
        (overflow, rf"the output, though input and weights are finite, of unit 'middle', microbatch 1, on {holder}"),
        (weights, rf"the weights middle.weight of unit 'middle', microbatch 0, on {holder}"),
        (data, rf"the input of unit 'first', microbatch 0, on {holder}"),
        (backward, rf"the gradient of first.\w+, of unit 'first' .those of later units are finite., on {holder}"),
    ):
        texts = run_threads(ranks, body)
        assert len(set(texts)) == 1
        with pytest.raises(AssertionError, match=rf"First not finite: {what}. What to do: "):
            raise AssertionError(texts[0])


@pytest.mark.parametrize("mesh", [{"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}])
def test_a_part_of_a_weight_on_one_rank_of_tp(mesh: dict[str, int]) -> None:
    """The sum over tp spreads it to both; only one rank has it in its weights, and that one is named."""

    def body(group: Group) -> str:
        model = decoder(llama(vocab=11, hidden=8, layers=2, heads=2, max_seq=6))
        engine = Engine(
            model.units, model.loss, world=group, mesh=make_mesh(group.size, **mesh), scaling=fixed(max_skips=0)
        )
        block: Any = engine.modules.get(2)
        if engine.groups.axis("tp").rank == 1 and block is not None:
            block.mlp.down.weight.data[3, 1] = math.inf
        ids = torch.ones(4, 6, dtype=torch.int64)
        with pytest.raises(DivergedError) as raised:
            engine.step(ids, ids)
        return str(raised.value)

    texts = run_threads(4, body)
    assert len(set(texts)) == 1
    who = "rank 3" if "pp" in mesh else "ranks 1, 3"
    assert f"the weights blocks.1.mlp.down.weight of unit 'blocks.1', microbatch 0, on {who}. " in texts[0]
    assert "What to do: a step before made them so" in texts[0]


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is() -> None:
    """A constant on top of the loss has no gradient."""
    engine = Engine(
        [nn.Linear(WIDTH, WIDTH)],
        mean_loss(lambda x, y: F.mse_loss(x, y) + (math.inf if bool((y > 0).all()) else 0.0)),
        scaling=fixed(max_skips=1),
    )
    before = {k: v.clone() for k, v in engine.full_state().items()}
    x = torch.ones(2, WIDTH)
    assert engine.step(x, x).skipped
    assert all(torch.equal(v, before[k]) for k, v in engine.full_state().items())
    assert not engine.step(x, -x).skipped
    assert engine.step(x, x).skipped
    with pytest.raises(DivergedError, match="the output, though input and weights are finite, of unit 'loss'"):
        engine.step(x, x)
