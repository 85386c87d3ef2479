"""What the executor holds after each action is what the verifier says; over many steps nothing is left."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from triloom.actions import Action
from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel import cut
from triloom.parallel.weight_grads import Accumulator, UnitGrads
from triloom.placement import Placement, zero1, zero3
from triloom.verify import Held, held

WIDTH = 6
SCHEDULES = ("1f1b", "interleaved", "zb_h1", "zb_v")
ROWS: dict[str, Placement] = {
    "zero1": zero1(),
    "zero1, recompute": zero1().with_(activations="recompute"),
    "zero3": zero3().with_(bucket_bytes=400),
    "zero3, recompute": zero3().with_(bucket_bytes=400, activations="recompute"),
}


class Norm(nn.Module):
    """The loss, with a parameter so that something of it waits for W."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.mse_loss(self.lin(x), y, reduction="sum"), self.weight(y)

    def weight(self, y: torch.Tensor) -> torch.Tensor:
        return torch.tensor(float(y.shape[0]))


def make(group: Group, schedule: str, placement: Placement) -> Engine:
    units = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(5)]
    return Engine(
        units, Norm(), world=group, mesh=make_mesh(group.size, pp=2), schedule=schedule, microbatches=4,
        optimizer=AdamW(lr=0.01), placement=placement,
    )  # fmt: skip


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.linspace(-1, 1, rows * WIDTH).view(rows, WIDTH)
    return x, x.flip(0)


def watch(engine: Engine) -> list[tuple[Action, frozenset[Held]]]:
    """The executor's table after each action, as it runs."""
    rows: list[tuple[Action, frozenset[Held]]] = []
    executor = engine._executor

    def watched(handler: Any) -> Any:
        def run(action: Action, state: Any) -> None:
            handler(action, state)
            rows.append((action, executor.held(state)))

        return run

    for op, handler in list(executor._handlers.items()):
        executor._handlers[op] = watched(handler)
    return rows


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("row", ROWS)
def test_the_table_after_each_action_is_what_the_verifier_said(schedule: str, row: str) -> None:
    def run(group: Group) -> None:
        engine = make(group, schedule, ROWS[row])
        rows, coord = watch(engine), engine.groups.axis("pp").rank
        for step in (engine.step, engine.step, engine.evaluate):
            rows.clear()
            step(*batch())
            program = engine.program if step == engine.step else engine._eval_program
            assert program is not None
            said = held(program, engine._layout)[coord]
            assert [a for a, _ in rows] == list(program.ranks[coord])
            for (action, now), then in zip(rows, said, strict=True):
                assert now == then, (str(action), now ^ then)
            assert said[-1] == frozenset()
            peak = max(sum(kind == "saved" for kind, *_ in now) for now in said)
            assert peak if step == engine.step else not peak

    run_threads(2, run)


class Alive(TorchDispatchMode):
    """How many storages made inside are still there, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.refs: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                ref = StorageWeakRef(t.untyped_storage())
                self.refs[ref.cdata] = ref
        return out

    def count(self) -> tuple[int, int]:
        self.refs = {key: ref for key, ref in self.refs.items() if not ref.expired()}
        made = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.refs.values())
        alive = [s.nbytes() for s in made if s is not None]
        return len(alive), sum(alive)


STEPS = 50


def storages(group: Group, schedule: str, placement: Placement) -> list[tuple[int, int]]:
    with Alive() as alive:
        engine = make(group, schedule, placement)
        counts = []
        for step in range(STEPS):
            engine.step(*batch())
            if step % 7 == 1:
                engine.evaluate(*batch(12))
            group.barrier().wait()  # the peer has let go of what was sent to it
            counts.append(alive.count())
    return counts


PAIRS = [
    pytest.param(schedule, row, marks=() if i % len(ROWS) == j else pytest.mark.full, id=f"{schedule}-{row}")
    for i, schedule in enumerate(SCHEDULES)
    for j, row in enumerate(ROWS)
]


@pytest.mark.parametrize(("schedule", "row"), PAIRS)
def test_tensors_are_as_many_after_50_steps(schedule: str, row: str) -> None:
    for counts in run_threads(2, partial(storages, schedule=schedule, placement=ROWS[row])):
        assert set(counts[3:]) == {counts[3]}, counts


class Residual(nn.Module):
    """Its sum is saved by nobody; with ``tanh`` after it, autograd saves the output."""

    def __init__(self, saved: bool) -> None:
        super().__init__()
        self.lin, self.saved = nn.Linear(WIDTH, WIDTH), saved

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.lin(x)
        return torch.tanh(out) if self.saved else out


@pytest.mark.parametrize("saved", [False, True])
def test_an_output_that_was_sent_is_held_only_if_its_backward_needs_it(saved: bool) -> None:
    unit, x = Residual(saved), torch.ones(3, WIDTH)
    params = list(unit.parameters())
    grads = {id(p): Accumulator("p", torch.zeros_like(p)) for p in params}
    out, record = cut.forward(unit, cut.Boundary([x], cut.boundary(x).spec, (True,)))
    want = torch.autograd.grad(unit(fresh := x.clone().requires_grad_()).sum(), [fresh, *params])
    output = StorageWeakRef(out.leaves[0].untyped_storage())
    del out
    assert output.expired() != saved
    (dx,) = cut.backward(record, [torch.ones(3, WIDTH)], params, UnitGrads(grads))
    assert torch.equal(dx, want[0])
    assert all(torch.equal(grads[id(p)].settle(), g) for p, g in zip(params, want[1:], strict=True))
