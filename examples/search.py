"""A search for hyper-parameters: several engines in one process, no two of which know of each other.

    mpirun -n 4 python examples/search.py

Every rank trains its share of the candidates side by side, an engine each. Half of all candidates, the worse one,
is given up after each round (successive halving, Jamieson and Talwalkar, arXiv 1502.07943).
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triloom
from triloom.groups.objects import gather_objects

Candidate = tuple[float, int]
"""Learning rate and width."""


def batch(step: int, samples: int = 64) -> tuple[Tensor, Tensor]:
    """A wavy function of two numbers."""
    x = 4 * torch.rand(samples, 2, generator=torch.Generator().manual_seed(step)) - 2
    return x, torch.sin(3 * x[:, :1]) * x[:, 1:]


def build(rate: float, width: int) -> triloom.Engine:
    """An engine without a world trains on its own."""
    torch.manual_seed(0)
    units = [nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)]
    return triloom.Engine(units, triloom.mean_loss(F.mse_loss), optimizer=triloom.AdamW(lr=rate, weight_decay=0.0))


def main(
    rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1), widths: tuple[int, ...] = (8, 32), steps: int = 100
) -> Candidate:
    with triloom.init() as world:
        candidates = list(itertools.product(rates, widths))
        mine = {c: build(*c) for c in candidates[world.rank :: world.size]}
        while len(candidates) > 1:
            for engine in mine.values():
                for _ in range(steps):
                    engine.step(*batch(engine.steps))
            losses = [[engine.evaluate(*batch(-1, 512)).loss, *c] for c, engine in mine.items()]
            ranking = sorted(row for rows in gather_objects(world.group, losses) for row in rows)
            candidates = [(rate, width) for _, rate, width in ranking[: (len(ranking) + 1) // 2]]
            mine = {c: engine for c, engine in mine.items() if c in candidates}
            if world.rank == 0:
                for loss, rate, width in ranking:
                    verdict = "kept" if (rate, width) in candidates else "gone"
                    print(f"{verdict}  lr {rate:<7g} width {width:<3} loss {loss:.4f}")
        return candidates[0]


if __name__ == "__main__":
    main()
