"""Programs from files, unit by unit, through the engine; what a rank holds between actions; skips and varying shapes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from triloom.actions import Program, parse_program
from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.placement import Placement, zero0, zero3

WIDTH = 5


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.lin(x))


def blocks(n: int) -> list[nn.Module]:
    gen, made = torch.Generator().manual_seed(3), [Block().double() for _ in range(n)]
    for p in (p for m in made for p in m.parameters()):
        p.data = torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.5
    return list(made)


def batch(step: int, rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(40 + step)
    x, y = (torch.randn(rows, WIDTH, generator=gen, dtype=torch.float64) for _ in range(2))
    return x, y


def evaluated(group: Group, order: Program | None, placement: Placement) -> tuple[list[float], str]:
    engine = Engine(
        blocks(7), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=2), microbatches=3,
        optimizer=AdamW(lr=0.05), placement=placement, schedule="interleaved" if order is None else lambda p, m: order,
    )  # fmt: skip
    losses = [engine.evaluate(*batch(9)).loss, engine.step(*batch(0)).loss, engine.evaluate(*batch(9)).loss]
    return losses, engine.program.to_csv()


@pytest.mark.parametrize("placement", [zero0(), zero3()], ids=["zero0", "zero3"])
def test_a_complete_program_of_units_from_a_file_trains_and_evaluates(placement: Placement) -> None:
    want, text = run_threads(2, partial(evaluated, order=None, placement=placement))[0]
    assert "F:unit1@0" in text or not placement.params.sharded
    got, again = run_threads(2, partial(evaluated, order=parse_program(text), placement=placement))[0]
    assert got == want and again == text
