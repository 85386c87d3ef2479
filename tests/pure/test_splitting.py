"""W split from B inside foreign units: the bits of torch's own backward, and gradients that really wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triloom.engine import Engine
from triloom.estimate import estimate
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.memory import Report
from triloom.mesh import make_mesh
from triloom.optim import AdamW
from triloom.parallel import cut
from triloom.parallel.build import UnitLike, mean_loss
from triloom.parallel.cut import Boundary, boundary
from triloom.parallel.deferred_calls import Sum
from triloom.parallel.executor import UnitRun
from triloom.parallel.executor import _gradients as unit_gradients
from triloom.parallel.guard import guard
from triloom.parallel.splitting import Splitter, describe_unsplit, second_pass
from triloom.parallel.weight_grads import Accumulator, UnitGrads
from triloom.placement import Placement, zero1, zero3
from triloom.schedules import zb_h1
from triloom.tracing import Run


class Fn(nn.Module):
    """A function of an input and some parameters, as a module."""

    def __init__(self, fn: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.fn = fn
        self.params = nn.ParameterList([nn.Parameter(torch.randn(s) * 0.5) for s in shapes])

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, *self.params)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(lambda y: torch.tanh(self.inside(y)), x, use_reentrant=False)
        return out


def shared(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x, w)), w)), w)


def also(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return F.linear(F.linear(x * w[0], w), v) * w.sum()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear of a sequence": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "linear of a vector": (lambda: nn.Linear(6, 5), (6,)),
    "linear of a transposed input": (lambda: Fn(lambda x, *wb: F.linear(x.mT, *wb), (5, 4), (5,)), (3, 4, 6)),
    "linear with a transposed weight": (lambda: Fn(lambda x, w: F.linear(x, w.t()), (6, 5)), (3, 6)),
    "linear by keyword": (lambda: Fn(lambda x, w, b: F.linear(weight=w, input=x, bias=b), (5, 6), (5,)), (3, 6)),
    "bilinear": (lambda: Fn(lambda x, w, b: F.bilinear(x, x, w, b), (5, 6, 6), (5,)), (7, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv1d, groups and dilation": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), (2, 4, 7, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2), (2, 4, 7, 6)),
    "conv2d, padding by name": (lambda: nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 7, 6)),
    "conv2d, reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 5, 3, stride=2, output_padding=1), (2, 4, 5, 4)),
    "x @ w": (lambda: Fn(lambda x, w: x @ w, (6, 5)), (3, 4, 6)),
    "w @ x": (lambda: Fn(lambda x, w: w @ x, (5, 3)), (3, 6)),
    "x @ w^T": (lambda: Fn(lambda x, w: x @ w.t(), (5, 6)), (3, 6)),
    "matmul of two parameters": (lambda: Fn(lambda x, v, w: x + torch.matmul(v, w), (3, 4), (4, 6)), (3, 6)),
    "bmm": (lambda: Fn(lambda x, w: torch.bmm(x, w), (3, 6, 5)), (3, 4, 6)),
    "addmm": (lambda: Fn(lambda x, b, w: torch.addmm(b, x, w, beta=0.5, alpha=2.0), (5,), (6, 5)), (3, 6)),
    "baddbmm": (lambda: Fn(lambda x, b, w: b.baddbmm(x, w), (3, 4, 5), (3, 6, 5)), (3, 4, 6)),
    "einsum": (lambda: Fn(lambda x, w: torch.einsum("bsi,oi->bso", x, w), (5, 6)), (3, 4, 6)),
    "parts of one weight": (lambda: Fn(lambda x, w: F.linear(x, w[:4]) @ w[4:].t(), (7, 4)), (3, 4)),
    "shared by three calls": (lambda: Fn(shared, (6, 6)), (3, 6)),
    "in place after": (lambda: Fn(lambda x, w, b: F.linear(x, w, b).relu_(), (5, 6), (5,)), (3, 6)),
}  # fmt: skip
FACTORS = ("matmul of two parameters",)
"""The gradient of a parameter needs the values of another."""
MIXED = {
    "checkpointed": (lambda: nn.Sequential(Checkpointed(), nn.Linear(6, 3)), (4, 6)),
    "also multiplied": (lambda: Fn(also, (6, 6), (6, 6)), (3, 6)),
    "layer norm between": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)), (3, 6)),
    "batch norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), (2, 4, 9)),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 3, 8)),
}  # fmt: skip


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


@contextmanager
def without_memory(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that are sharded between B and the next F."""
    values = [(p, p.detach().clone(), p.untyped_storage().nbytes()) for p in params]
    for p, _, _ in values:
        p.untyped_storage().resize_(0)
    yield
    for p, value, nbytes in values:
        assert p.untyped_storage().nbytes() == 0
        p.untyped_storage().resize_(nbytes)
        p.data.copy_(value)


def gradients(
    module: nn.Module,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    split: bool,
    with_input: bool = True,
    freed: bool = False,
) -> tuple[list[Tensor], list[Tensor], list[list[str]]]:
    """Input and weight gradients over three microbatches, and by microbatch what was left for W.

    freed: W runs while the parameters have no memory.
    """
    params = dict(module.named_parameters())
    names = {id(p): n for n, p in params.items()}
    sums = {n: Accumulator(n, torch.zeros_like(p)) for n, p in params.items()}
    sink, splitter = UnitGrads({id(p): sums[n] for n, p in params.items()}), Splitter()
    gen, made, waits = torch.Generator().manual_seed(1), [], []
    for mb in range(3):
        x = torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)
        given = Boundary([x], boundary(x).spec, (with_input,))
        inside = splitter.redirecting(module, params.values(), sink) if split else None
        out, record = cut.forward(module, given, inside=inside)
        splitter.settle(record.outputs)
        y = out.leaves[0]
        sink.deferring = mb
        unit = UnitRun(0, module, list(params.values()), sink, splitter=splitter)
        made += unit_gradients(unit, record, [torch.randn(y.shape, generator=gen).to(dtype)])
        late = [w for w in sink.pending.get(mb, ()) if isinstance(w[1], Sum)]
        if freed:
            with without_memory(params.values()):
                sink.flush(mb)
        waits.append([n for n, a in sums.items() if any(a is use for use, _ in late)])
        if mb:  # the first microbatch's W comes after the second's B
            sink.flush(mb - 1)
    sink.flush(2)
    assert not sink.pending and len(names) == len(params)
    return made, [a.settle() for a in sums.values()], waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*CASES, *MIXED])
def test_same_bits_as_an_unsplit_backward(name: str, dtype: torch.dtype) -> None:
    make, shape = {**CASES, **MIXED}[name]
    for with_input, freed in ((True, False), (False, False), (True, name not in FACTORS)):
        torch.manual_seed(0)
        module = make().to(dtype)
        module.requires_grad_(True)
        dx, dw, none = gradients(module, shape, dtype, False, with_input)
        got_dx, got_dw, waits = gradients(module, shape, dtype, True, with_input, freed)
        for got, want in zip(got_dx + got_dw, dx + dw, strict=True):
            assert torch.equal(got, want), name
        assert none == [[], [], []] and waits[0] == waits[1] == waits[2]
        late = set(waits[0])
        assert late == {n for n, _ in module.named_parameters()} if name in CASES else late


@pytest.mark.parametrize(
    "name,late",
    [
        ("also multiplied", {"params.1"}),
        ("layer norm between", {"0.weight", "0.bias", "2.weight", "2.bias"}),
        ("checkpointed", {"1.weight", "1.bias"}),
        ("batch norm", {"0.weight", "0.bias"}),
        ("transformer layer", {"linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias"}),
    ],
)
def test_what_something_else_uses_too_stays_in_b(name: str, late: set[str]) -> None:
    make, shape = MIXED[name]
    assert set(gradients(make(), shape, torch.float32, True)[2][0]) == late


def test_a_product_of_sharded_parameters_stays_in_b() -> None:
    for name in (*FACTORS, "linear", "addmm"):
        make, shape = CASES[name]
        module = make()
        for p in module.parameters():
            guard(p, name, lambda: True)
        late = gradients(module, shape, torch.float32, True)[2][0]
        assert bool(late) == (name not in FACTORS), name


def test_an_lstm_cannot_be_split_and_pays_nothing_after_its_first_forward() -> None:
    torch.manual_seed(0)
    lstm, splitter = Lstm(), Splitter()
    want, got = (gradients(lstm, (5, 2, 4), torch.float32, split) for split in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))
    assert got[2] == [[], [], []]
    sink = UnitGrads({})
    _, record = cut.forward(
        lstm, boundary(torch.ones(5, 2, 4)), inside=splitter.redirecting(lstm, lstm.parameters(), sink)
    )
    assert not splitter.nothing and not splitter.rest
    splitter.settle(record.outputs)
    assert splitter.nothing and {id(p) for p in splitter.rest} == {id(p) for p in lstm.parameters()}
    with splitter.redirecting(lstm, lstm.parameters(), sink) as mode:
        assert mode is None


@pytest.mark.parametrize("with_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_pass_is_the_same_bits_and_only_where_nothing_else_waits(with_input: bool, dtype: torch.dtype) -> None:
    lstm = Lstm().to(dtype)
    want = gradients(lstm, (5, 2, 4), dtype, True, with_input)
    got = gradients(second_pass(lstm), (5, 2, 4), dtype, True, with_input)
    assert all(torch.equal(a, b) for a, b in zip(got[0] + got[1], want[0] + want[1], strict=True))
    assert set(got[2][0]) == {n for n, _ in lstm.named_parameters()}
    make, shape = MIXED["layer norm between"]
    assert "1.weight" not in gradients(second_pass(make()), shape, torch.float32, True)[2][0]


# ---------------------------------------------------------------- units in an engine


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.proj = nn.Conv1d(4, 4, 3, padding=1), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.conv(x.mT).mT)
        out: Tensor = self.norm(x + self.proj(y) @ self.proj.weight)
        return out


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x)[0]
        return out


Trained = tuple[list[float], dict[str, Tensor], dict[str, list[str]]]


def train(group: Group, schedule: str, placement: Placement, twice: bool = False) -> Trained:
    torch.manual_seed(3)  # the threads draw in turn; replicate() gives all the values of one of them
    made = [Conv(), Recurrent(), Conv(), Conv()]
    gen = torch.Generator().manual_seed(5)
    for p in (p for m in made for p in m.parameters()):
        p.data = torch.randn(p.shape, generator=gen) * 0.5
    units = [second_pass(m) if twice else m for m in made]
    engine = Engine(
        units, mean_loss(F.mse_loss), world=group, mesh=make_mesh(group.size, pp=2), schedule=schedule,
        placement=placement, microbatches=3, optimizer=AdamW(lr=0.05),
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    x = torch.randn(12, 5, 4, generator=gen).tensor_split(dp.size)[dp.rank]
    losses = [engine.step(x, x.flip(1)).loss for _ in range(3)]
    return losses, engine.full_state(), engine.unsplit


ROWS = [
    zero1(),
    zero3().with_(bucket_bytes=200),
    zero1().with_(activations="recompute"),
    zero1().with_(cadence="microbatch"),
]


@pytest.mark.parametrize("placement", ROWS, ids=["zero1", "zero3", "recompute", "microbatch"])
def test_schedules_with_a_separate_w_are_the_bits_of_1f1b(placement: Placement) -> None:
    ranks = 4 if placement.params.sharded else 2
    want = run_threads(ranks, partial(train, schedule="1f1b", placement=placement))
    assert all(one[2] == {} for one in want)
    for schedule, twice in (("zb_h1", False), ("zb_v", False), ("zb_h1", True)):
        got = run_threads(ranks, partial(train, schedule=schedule, placement=placement, twice=twice))
        assert [one[0] for one in got] == [one[0] for one in want]
        for name, value in want[0][1].items():
            assert torch.equal(got[0][1][name], value), (schedule, name)
        units = (
            {}
            if twice and not placement.params.sharded
            else {"1": [f"lstm.{kind}_{g}h_l0" for kind in ("weight", "bias") for g in "ih"]}
        )
        assert {k: v for one in got for k, v in one[2].items()} == units, schedule


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inside(x) @ self.inside[2].weight[:, :16])


def test_units_that_cannot_be_split_are_named_in_a_line() -> None:
    assert describe_unsplit([{}, {}]) == ""
    line = describe_unsplit([{}, {"rnn": ["a", "b", "c", "d"]}, {"rnn": ["a", "b", "c", "d"]}])
    assert line.endswith("nothing of the unit can wait for W: rnn (a, b, c, ...)")


def test_memory_of_foreign_units_with_a_separate_w_is_foreseen() -> None:
    x = torch.ones(32, 16)
    units: dict[str, UnitLike] = {str(i): lambda scope: Deep() for i in range(5)}

    def run(group: Group) -> Report:
        engine = Engine(
            units, mean_loss(F.mse_loss), world=group, mesh=make_mesh(2, pp=2), schedule="zb_h1", microbatches=4,
            optimizer=AdamW(lr=0.1),
        )  # fmt: skip
        for _ in range(2):
            engine.step(x, x)
        return engine.memory()

    meta = ((32, 16), torch.float32)
    foreseen = estimate(
        Run(
            units=units, loss=mean_loss(F.mse_loss), mesh=make_mesh(2, pp=2), order=zb_h1(2, 4),
            optimizer=AdamW(lr=0.1), placement=zero1(), inputs=meta, targets=meta,
        )
    )  # fmt: skip
    for seen, said in zip(run_threads(2, run), foreseen, strict=True):
        assert abs(said.peak["deferred"] / seen.peak["deferred"] - 1) < 0.1
        assert abs(said.total / seen.total - 1) < 0.05
