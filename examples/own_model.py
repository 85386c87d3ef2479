"""Your own model in your own loop: a GRU learns to add the two marked numbers of a sequence.

    mpirun -n 2 python examples/own_model.py

A model is a list of units. Two ranks are two pipeline stages here; four are two such pipelines, data parallel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triloom


class Reader(nn.Module):
    """A sequence of (number, mark) to the last state of a GRU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(2, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[1][0]


def problem(step: int, samples: int, length: int = 12) -> tuple[Tensor, Tensor]:
    """Random numbers, two of them marked; wanted is the sum of those two."""
    draw = torch.Generator().manual_seed(step)
    numbers = torch.rand(samples, length, generator=draw)
    marked = torch.rand(samples, length, generator=draw).topk(2).indices
    marks = torch.zeros_like(numbers).scatter_(1, marked, 1.0)
    return torch.stack([numbers, marks], dim=2), (numbers * marks).sum(1, keepdim=True)


def main(steps: int = 400, samples: int = 128, width: int = 48) -> float:
    torch.manual_seed(0)
    units = [Reader(width), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    with triloom.init() as world:
        mesh = triloom.make_mesh(world.size, pp=2 if world.size % 2 == 0 else 1)
        engine = triloom.Engine(
            units,
            triloom.mean_loss(F.mse_loss),
            world=world.group,
            mesh=mesh,
            optimizer=triloom.AdamW(lr=4e-3),
            microbatches=4,
        )
        dp, mine = mesh.axis("dp"), mesh.coords(world.rank)["dp"]
        for step in range(steps):
            x, y = (t.chunk(dp)[mine] for t in problem(step, samples))
            metrics = engine.step(x, y)
            if world.rank == 0 and step % 50 == 0:
                print(f"step {step:4}  loss {metrics.loss:.4f}  (guessing the mean: 0.1667)")
        return metrics.loss


if __name__ == "__main__":
    main()
