"""Models with awkward stages, trained through the engine: shared by the tests on threads and on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.mesh import make_mesh
from triloom.microbatches import Microbatches
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.parallel.skips import with_skips
from triloom.placement import zero1

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


class Kinds(nn.Module):
    """Everything that may stand between stages, around a tensor that is computed on."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        tree = x if isinstance(x, dict) else {"x": x}
        h = tree["x"] + torch.tanh(self.lin(tree["x"]))
        some = h.detach() > 0
        if "bool" in tree:
            assert tree["bool"].dtype == torch.bool and tree["bool"].shape == some.shape
            assert (
                tree["pair"][0].tolist() == list(range(7)) and tree["pair"][1] is None and tree["pair"][2] == (3, "é")
            )
            h = h * torch.where(tree["bool"], 1.0, 0.5) + tree["pair"][0].sum() * 1e-3
        byte = torch.arange(7, dtype=torch.uint8)
        return {"x": h, "bool": some, "pair": (byte, None, (3, "é")), "list": [torch.tensor(2, dtype=torch.int32), 1.5]}


class Only(nn.Module):
    """A stage without a parameter."""

    def forward(self, x: dict[str, Any]) -> torch.Tensor:
        assert x["list"][0].item() == 2 and x["list"][1] == 1.5
        return x["x"] if isinstance(x["x"], torch.Tensor) else x


def kinds() -> list[nn.Module]:
    gen, made = torch.Generator().manual_seed(3), [Kinds().double() for _ in range(5)]
    for p in (p for m in made for p in m.parameters()):
        p.data = torch.randn(p.shape, generator=gen, dtype=torch.float64) * 0.5
    return [*made, Only()]


class Shrink(nn.Module):
    """Keeps the rows that a value chooses: its output's shape depends on the data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[x[:, 0] > 0]])


class RowSum(nn.Module):
    """A loss over however many rows there are, weighed by samples."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x**2).sum(), self.weight(targets)

    def weight(self, targets: torch.Tensor) -> torch.Tensor:
        return torch.tensor(float(targets.shape[0]))


def lengths(step: int, count: int) -> tuple[Microbatches, Microbatches]:
    """Sequences whose length differs by microbatch and step."""
    gen = torch.Generator().manual_seed(step)
    sizes = [2 + (step + i) % 3 for i in range(count)]
    pieces = [torch.randn(2 + i % 2, n, WIDTH, generator=gen, dtype=torch.float64) for i, n in enumerate(sizes)]
    return Microbatches(pieces), Microbatches([p.flip(1) for p in pieces])


MODELS: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[int], Any], Any, dict[str, Any]]] = {
    "lengths": (lambda: blocks(7), lambda i: lengths(i, 3), mean_loss(F.mse_loss), {}),
    "kinds": (kinds, batch, mean_loss(F.mse_loss), {}),
    "data": (lambda: [*blocks(2), Shrink(), *blocks(3)], batch, RowSum(), {"shapes": "data"}),
    "uneven": (lambda: blocks(7), batch, mean_loss(F.mse_loss), {"stages": {2: (1, 7), 3: (5, 1, 2)}}),
}


def trained(group: Group, name: str, pp: int, **options: Any) -> tuple[list[float], dict[str, torch.Tensor], str]:
    make, data, loss, more = MODELS[name]
    options = {**more, **options}
    options["stages"] = options.get("stages", {}).get(pp)
    engine = Engine(
        make(), copy.deepcopy(loss), world=group, mesh=make_mesh(group.size, pp=pp), microbatches=3,
        optimizer=AdamW(lr=0.05), **options,
    )  # fmt: skip
    losses = [engine.step(*data(i)).loss for i in (0, 1, 0, 2, 1)]
    return [*losses, engine.evaluate(*data(0)).loss], engine.full_state(), str(engine.verdict)


class Join(Block):
    """Uses what was made earlier."""

    def forward(self, x: torch.Tensor, *earlier: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + torch.stack([torch.sin(e) * (i + 1) for i, e in enumerate(earlier)]).sum(0)


PAIRS = (("1", "7"), ("2", "5"), ("3", "5"), ("1", "4"), ("6", "7"))


def joined() -> list[nn.Module]:
    made: list[nn.Module] = blocks(9)
    for i in (4, 5, 7):
        join = Join().double()
        join.load_state_dict(made[i].state_dict())
        made[i] = join
    return made


def with_joins(group: Group, pp: int, schedule: str, **columns: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    modules: Any = joined()
    if schedule == "gpipe":  # functions of a Scope
        modules = [lambda scope, m=m: m for m in modules]
    engine = Engine(
        with_skips(modules, PAIRS), mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=pp),
        microbatches=3, optimizer=AdamW(lr=0.05), schedule=schedule, placement=zero1().with_(**columns),
    )  # fmt: skip
    return [engine.step(*batch(i)).loss for i in range(3)], engine.full_state()
