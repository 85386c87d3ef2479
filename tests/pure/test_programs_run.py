"""The engine on programs from files, on pytrees and shapes that vary, and on skip connections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triloom import schedules
from triloom.actions import Program, parse_program
from triloom.engine import Engine
from triloom.errors import ConfigError, TriloomError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.microbatches import Microbatches
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.parallel.skips import with_skips
from triloom.passes import add_communication
from triloom.placement import Placement, zero0, zero1, zero3
from triloom.verify import verify

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


# ---------------------------------------------------------------- shapes


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


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_pytrees_between_stages_equal_one_process(name: str) -> None:
    losses, params, _ = trained(Solo(), name, 1)
    for pp in (2, 3):
        for schedule in ("1f1b", "zb_h1") if name == "uneven" else ("1f1b", "interleaved", "zb_h1"):
            got, state, verdict = run_threads(pp, partial(trained, name=name, pp=pp, schedule=schedule))[0]
            assert got == losses
            assert all(torch.equal(state[k], v) for k, v in params.items())
            assert ("bytes of activations unknown" in verdict) == (name == "data")


def test_shapes_that_follow_from_the_data_are_refused_unless_said_so() -> None:
    with pytest.raises(TriloomError, match=r"another shape .* give Engine\(shapes='data'\)"):
        run_threads(2, partial(trained, name="data", pp=2, shapes="batch", stages={2: (3, 4)}))
    with pytest.raises(ConfigError, match="shapes='tokens'"):
        trained(Solo(), "data", 1, shapes="tokens")


def test_what_cannot_travel_is_named() -> None:
    def run(group: Group) -> None:
        class Bad(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                return {"x": x, "dtype": torch.float32}

        engine = Engine(
            [nn.Linear(WIDTH, WIDTH), Bad(), Only()], mean_loss(F.mse_loss), world=group, mesh=make_mesh(2, pp=2)
        )
        engine.step(torch.ones(2, WIDTH), torch.ones(2, WIDTH))

    with pytest.raises(ConfigError, match="must be dicts, lists, tuples, tensors and plain values"):
        run_threads(2, run)


def test_a_batch_that_is_cut_already_must_fit() -> None:
    engine = Engine(blocks(1), mean_loss(F.mse_loss), microbatches=2)
    x = torch.ones(2, WIDTH, dtype=torch.float64)
    with pytest.raises(ConfigError, match="2 microbatches a step, the batch is cut into 3"):
        engine.step(Microbatches([x] * 3), Microbatches([x] * 3))
    with pytest.raises(ConfigError, match="must agree on dim 0"):
        engine.step(Microbatches([x, {"a": x, "b": x[:1]}]), Microbatches([x, x]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(schedules.NAMED)), st.integers(1, 4), st.integers(1, 6), st.integers(0, 3))
def test_receives_that_wait_for_a_header_deadlock_nowhere(name: str, p: int, m: int, early: int) -> None:
    program = add_communication(schedules.NAMED[name](p, m), early)
    for lanes in ("independent", "per_direction"):
        verdict = verify(program, lanes=lanes, headers=True)
        assert verdict.headers and verdict.peak_bytes is None


# ---------------------------------------------------------------- skips


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


def plain_gradients() -> tuple[float, dict[str, torch.Tensor]]:
    modules, made = joined(), dict[str, torch.Tensor]()
    x, y = batch(0)
    for name, module in ((str(i), m) for i, m in enumerate(modules)):
        x = made[name] = module(x, *(made[s] for s, t in PAIRS if t == name))
    loss = F.mse_loss(x, y)
    loss.backward()
    params = {f"{i}.{n}": p for i, m in enumerate(modules) for n, p in m.named_parameters()}
    return loss.item(), {name: p.grad for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize("pp", [3, 4])
def test_skip_connections_equal_one_process(pp: int) -> None:
    losses, params = with_joins(Solo(), 1, "1f1b")
    for schedule, columns in (
        ("1f1b", {}),
        ("interleaved", {}),
        ("zb_h1", {}),
        ("gpipe", {}),
        ("1f1b", {"activations": "recompute"}),
    ):
        got, state = run_threads(pp, partial(with_joins, pp=pp, schedule=schedule, **columns))[pp - 1]
        assert got == losses
        assert all(torch.equal(state[k], v) for k, v in params.items())


def test_gradients_of_skip_connections_are_those_of_torch() -> None:
    loss, grads = plain_gradients()
    engine = Engine(with_skips(joined(), PAIRS), mean_loss(F.mse_loss), optimizer=AdamW(lr=0.1), clip=None)
    assert engine.step(*batch(0)).loss == pytest.approx(loss, rel=1e-12)
    for name, moment in engine.full_state("exp_avg").items():
        torch.testing.assert_close(moment, 0.1 * grads[name], rtol=1e-10, atol=1e-14)


def test_skips_that_cannot_be_are_named() -> None:
    with pytest.raises(ConfigError, match="of a unit '9'; the units are 0, 1, 2"):
        with_skips(blocks(3), [("0", "9")])
    with pytest.raises(ConfigError, match="goes backwards"):
        with_skips(blocks(3), [("2", "1")])
