"""Memory by class: the formulas of ZeRO, the ledger against storages that are really alive, estimates against runs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from triloom import cli, schedules
from triloom.actions import Action, parse_action
from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.estimate import estimate
from triloom.groups.base import Done, Group
from triloom.groups.phantom import Phantom
from triloom.groups.threads import run_threads
from triloom.memory import STATE, BucketBytes, Ledger, Report, UnitBytes, walk, zero_bytes
from triloom.mesh import Mesh, make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.optim import SGD, AdamW
from triloom.parallel.build import mean_loss
from triloom.parallel.reduction import REDUCTIONS
from triloom.passes import StateLayout, add_communication
from triloom.placement import NAMED, Placement, State, zero0, zero1, zero2, zero3
from triloom.together import SetupError
from triloom.tracing import Run

SEQ, SHARE = 16, 8
GPT2 = gpt2(vocab=97, hidden=32, layers=3, heads=4, max_seq=SEQ, dropout=0.1, attention_dropout=0.1)
LLAMA = llama(vocab=97, hidden=32, layers=3, heads=4, max_seq=SEQ)


def train(group: Group, dec: Any, mesh: Mesh, steps: int = 2, **how: Any) -> Report:
    model = decoder(dec)
    engine = Engine(model.units, model.loss, ties=model.ties, world=group, mesh=mesh, **how)
    for _ in range(steps):
        ids = torch.arange(SHARE * SEQ).view(SHARE, SEQ) % dec.vocab
        engine.step(ids, ids)
    return engine.memory()


# ---------------------------------------------------------------- model states


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("grad", ["bfloat16", "float32"])
def test_model_states_are_the_formulas_of_zero(ranks: int, grad: str) -> None:
    """16, 4 + 12/N, 2 + 14/N, 16/N bytes a parameter with bf16 gradients; 18, 6 + 12/N, 2 + 16/N, 18/N with fp32."""
    size = {"bfloat16": 2, "float32": 4}[grad]
    formulas = {"zero0": 14 + size, "zero1": 2 + size + 12 / ranks, "zero2": 2 + (size + 12) / ranks}
    formulas["zero3"] = (14 + size) / ranks

    def run(group: Group, placement: Placement) -> Report:
        units = [nn.Linear(70, 50).bfloat16(), nn.Linear(50, 70).bfloat16()]
        engine = Engine(units, mean_loss(F.mse_loss), world=group, placement=placement, dtype=torch.bfloat16)
        x = torch.ones(2, 70, dtype=torch.bfloat16)
        engine.step(x, x)
        return engine.memory()

    numel = 70 * 50 * 2 + 120
    for name, formula in formulas.items():
        row = NAMED[name]()
        placement = row.with_(grads=State(sharded=row.grads.sharded, dtype=grad), cadence="step")
        reports = run_threads(ranks, partial(run, placement=placement))
        held = sum(r.present[kind] for r in reports for kind in STATE)
        assert held == round(ranks * numel * formula), name
        own = {"params": row.params.sharded, "grads": row.grads.sharded, "optimizer": row.optimizer.sharded}
        assert zero_bytes(**own, ranks=ranks, param=2, grad=size) == pytest.approx(formula)
        assert sum(r.present["padding"] for r in reports) < 0.1 * held
        assert all(r.present["gathered"] == r.present["grad_buckets"] == 0 for r in reports)


def test_gradients_in_16_bits_are_what_torch_sums_in_16_bits() -> None:
    """Two microbatches of exact gradients: 1 + 2^-9 needs ten bits, so a bf16 sum is rounded and an fp32 one is not."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    def gradient(dtype: str | None) -> float:
        placement = zero0().with_(grads=State(dtype=dtype))
        loss = mean_loss(lambda y, t: y.sum())
        engine = Engine(
            [One()], loss, placement=placement, optimizer=SGD(lr=1.0, momentum=0), microbatches=2, clip=None
        )
        engine.step(torch.tensor([[2.0], [2.0**-8]]), torch.zeros(2, 1))
        return -engine.full_state()["0.w"].item()

    assert gradient(None) == 1 + 2**-9
    assert gradient("bfloat16") == 1.0


def test_whole_parameters_and_gradients_count_while_they_are_there() -> None:
    def run(group: Group, **columns: Any) -> Report:
        placement = zero3().with_(bucket_bytes=20_000, prefetch=0, **columns)
        return train(group, LLAMA, make_mesh(2), placement=placement, microbatches=2)

    (some, _), (all_of_them, _) = run_threads(2, run), run_threads(2, partial(run, keep=True))
    whole = 2 * some.present["params"]
    assert 0 < some.peak["gathered"] < 0.6 * whole
    assert whole <= all_of_them.peak["gathered"] < 1.1 * whole
    assert 0 < some.peak["grad_buckets"] < 0.6 * whole
    assert some.present["gathered"] == some.present["grad_buckets"] == 0


def test_further_uses_of_tied_parameters_and_frozen_ones_have_their_own_lines() -> None:
    report = train(run_solo(), GPT2, make_mesh(1))
    assert report.present["ties"] == 4 * 97 * 32
    layer = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    layer[0].requires_grad_(False)
    engine = Engine([layer], mean_loss(F.mse_loss), optimizer=AdamW())
    assert engine.memory().present["fixed"] == 4 * (36 + 6 + 6 + 6) + 8
    assert engine.memory().present["params"] == 4 * 12


def run_solo() -> Group:
    from triloom.groups.solo import Solo

    return Solo()


# ---------------------------------------------------------------- the ledger


class Alive(TorchDispatchMode):
    """Bytes of all storages made inside that are still there."""

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

    def bytes(self) -> int:
        made = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.refs.values())
        alive = {s._cdata: s.nbytes() for s in made if s is not None}
        self.refs = {key: ref for key, ref in self.refs.items() if not ref.expired()}
        return sum(alive.values())


class Compare:
    """A recorder that holds the ledger against what is alive after every action."""

    def __init__(self) -> None:
        self.alive, self.rows = Alive(), list[tuple[str, int, int]]()
        self.ledger = Ledger()

    def begin(self, actions: int) -> None:
        self.rows.clear()

    def wait(self, begin_ns: int, end_ns: int) -> None: ...

    def action(self, action: Action, begin_ns: int, end_ns: int) -> None:
        self.rows.append((str(action), sum(self.ledger.report().present.values()), self.alive.bytes()))


@pytest.mark.parametrize("dec", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("activations", ["keep", "selective", "recompute"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_the_ledger_is_what_is_alive_after_every_action(dec: Any, activations: str, schedule: str) -> None:
    compare, model = Compare(), decoder(dec)
    ids = (torch.arange(SHARE * SEQ) % 97).view(SHARE, SEQ)
    with compare.alive:
        engine = Engine(
            model.units, model.loss, ties=model.ties, schedule=schedule, microbatches=2, record=compare,
            placement=zero1().with_(activations=activations),
        )  # fmt: skip
        compare.ledger = engine.ledger
        for _ in range(2):
            engine.step(ids, ids)
    batch = engine.memory().present["batch"]  # was there before
    for text, counted, alive in compare.rows:
        assert abs(counted - batch - alive) < 0.01 * engine.memory().total, (text, counted - batch, alive)


def test_classes_add_up_by_hand() -> None:
    """Two stages of one unit, two microbatches, 1F1B on the first: F0 F1 BW0 BW1."""
    row = [parse_action(t) for t in ("F:stage0@0", "SEND:act0@0>1", "F:stage0@1", "SEND:act0@1>1", "RECV:grad1@0<1",
                                     "BW:stage0@0", "RECV:grad1@1<1", "UNSHARD:grads.0", "BW:stage0@1",
                                     "RESHARD:grads.0")]  # fmt: skip
    layout = StateLayout(((0,), (1,)), ((), ()))
    sizes = {0: UnitBytes(held=100, output=10, saved_output=10, carriers=7), 1: UnitBytes(held=1000)}
    report = walk(row, layout, lambda u, m: sizes[u], state={"params": 5}, buckets=[BucketBytes(grad_bucket=50)])
    assert report.peak["activations"] == 2 * 110 and report.peak["act_grads"] == 7 and report.peak["params"] == 5
    assert report.peak["transfers"] == 0  # the backward holds what is sent
    assert report.total == max(2 * 110 + 7 + 5, 110 + 7 + 5 + 50)
    assert report.present == {**dict.fromkeys(report.present, 0), "params": 5}
    again = walk(row, layout, lambda u, m: sizes[u], state={}, buckets=[BucketBytes()], recomputed=frozenset({0}))
    assert again.peak["activations"] == 10 and again.peak["transfers"] == 10


# ---------------------------------------------------------------- estimates


def foresee(dec: Any, mesh: Mesh, schedule: str, microbatches: int, **how: Any) -> tuple[Report, ...]:
    model, tokens = decoder(dec), ((SHARE, SEQ), torch.int64)
    return estimate(
        Run(
            units=model.units, loss=model.loss, ties=model.ties, mesh=mesh, optimizer=AdamW(), inputs=tokens,
            order=schedules.NAMED[schedule](mesh.axis("pp"), microbatches), targets=tokens, **how,
        )
    )  # fmt: skip


CASES: dict[str, tuple[Any, dict[str, int], str, int, dict[str, Any]]] = {
    "alone": (GPT2, {}, "1f1b", 1, {"placement": zero1()}),
    "recompute": (LLAMA, {}, "1f1b", 4, {"placement": zero1().with_(activations="recompute")}),
    "pipeline": (LLAMA, {"pp": 2}, "1f1b", 4, {"placement": zero0()}),
    "interleaved": (GPT2, {"pp": 2}, "interleaved", 4, {"placement": zero1().with_(activations="selective")}),
    "zero3, zb": (GPT2, {"dp": 2, "pp": 2}, "zb_h1", 3, {
        "placement": zero3().with_(bucket_bytes=20_000), "dtype": torch.bfloat16}),
    "zero2, sequence": (GPT2, {"dp": 2, "tp": 2}, "1f1b", 3, {
        "placement": zero2().with_(bucket_bytes=20_000, activations="recompute"), "sequence_parallel": True}),
    "budget": (LLAMA, {"pp": 2}, "1f1b", 4, {
        "placement": zero1().with_(activations="budget", activation_bytes=140_000)}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_estimates_are_within_5_percent_of_the_run(name: str) -> None:
    dec, axes, schedule, microbatches, how = CASES[name]
    mesh = make_mesh(axes.get("dp", 1) * axes.get("pp", 1) * axes.get("tp", 1), **axes)
    foreseen = foresee(dec, mesh, schedule, microbatches, **how)
    seen = run_threads(
        mesh.size, partial(train, dec=dec, mesh=mesh, schedule=schedule, microbatches=microbatches, **how)
    )
    for rank, report in enumerate(seen):
        expected = foreseen[mesh.coords(rank)["pp"]]
        assert expected.total == pytest.approx(report.total, rel=0.05)
        for kind in ("activations", "gathered", "grad_buckets", "deferred", "act_grads"):
            assert expected.peak[kind] == pytest.approx(report.peak[kind], rel=0.05), (rank, kind)


def test_a_model_that_fits_nowhere_is_estimated() -> None:
    """13 billion parameters, about 200 GB of state on one rank, without taking any of it."""
    dec = llama(vocab=1000, hidden=16384, layers=4, heads=128, max_seq=SEQ)
    model = 2 * 1000 * 16384 + 16384 + 4 * (4 * 16384**2 + 3 * 16384 * dec.ffn + 2 * 16384)
    report = foresee(dec, make_mesh(1), "1f1b", 2, placement=zero1())[0]
    assert report.present["params"] == 4 * model and report.present["moments"] == 8 * model


def test_estimates_refuse_modules_and_units_that_need_values() -> None:
    tokens = ((SHARE, 4), torch.float32)
    run = Run(
        units={"0": nn.Linear(4, 4)}, loss=mean_loss(F.mse_loss), mesh=make_mesh(1), optimizer=AdamW(),
        order=schedules.NAMED["1f1b"](1, 2), placement=zero1(), inputs=tokens, targets=tokens,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="unit '0' has its parameters already; give a function of a Scope"):
        estimate(run)

    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    def with_unit(build: Any) -> Run:
        return Run(**{**{f: getattr(run, f) for f in run.__dataclass_fields__}, "units": {"0": build}})

    with pytest.raises(ConfigError, match="unit '0' cannot be run without values"):
        estimate(with_unit(lambda scope: Asks(4, 4)))
    (report,) = estimate(with_unit(lambda scope: nn.Linear(4, 4)))
    assert report.present["params"] == 4 * 20


# ---------------------------------------------------------------- the command


def test_a_dry_run_says_what_ranks_will_hold_and_the_run_compares(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "--model.hidden=32", "--model.seq=16", "--train.batch=4", "--train.steps=2", "--run.plot=false",
             "--train.eval_batches=0", "--train.threads=1", "--placement.activations=recompute"]  # fmt: skip
    assert cli.main([*words, "--dry-run", "4", "--parallel.pp=2", "--placement.name=zero3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if "memory of a rank at its peak, MiB" in line)
    rows = {line.split()[1]: line.split()[2:] for line in lines[start + 1 : start + 8]}
    for kind in ("params", "grads", "moments", "gathered"):
        assert len(rows[kind]) == 2 and all(float(size) > 0 for size in rows[kind])

    assert cli.main([*words, f"--run.dir={tmp_path / 'run'}"]) == 0
    shown = capsys.readouterr().out
    assert "furthest off on any rank +0.0%" in shown
    peaks = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["peak_bytes"]
    assert {"params", "grads", "moments", "activations", "total"} <= set(peaks)
    assert peaks["params"] + peaks["grads"] + peaks["moments"] < peaks["total"] <= sum(peaks.values()) - peaks["total"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--placement.activations=budget"], "give both or neither"),
        (["--placement.activation_mb=3"], "give both or neither"),
        (["--placement.keep=true"], "leave out placement.keep, or use zero3"),
        (["--placement.shard_ranks=3"], "dp = 4 must be a multiple of shard_ranks = 3"),
        (["--placement.cadence=often"], "step, microbatch"),
    ],
)
def test_keys_of_the_placement_are_checked_together(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--dry-run", "4", *words]) == 2
    assert text in capsys.readouterr().err


# ---------------------------------------------------------------- staging, construction, budgets


@pytest.mark.parametrize("name", ["exact", "bfloat16", "int8", "topk"])
def test_staging_of_a_reduction_is_what_it_holds(name: str) -> None:
    """Counted are the storages that the rule makes before its wait and that live until then."""
    rule, numel, ranks = REDUCTIONS[name](), 64 * 40, 2

    def run(group: Group) -> int:
        grads, memory = torch.randn(numel), {"left": torch.zeros(numel)}
        mine = [t.untyped_storage()._cdata for t in (grads, memory["left"])]
        with Alive() as alive:
            work = rule.post(group, grads[: numel // ranks], grads, memory)
            alive.refs = {key: ref for key, ref in alive.refs.items() if key not in mine}
            held = alive.bytes()
            del work
        return held

    class Quiet(Phantom):
        def reduce_scatter(self, output: Any, input: Any, op: Any = "sum") -> Any:
            return Holding(output, input)

        all_to_all = reduce_scatter

    class Holding(Done):
        def __init__(self, *held: Any) -> None:
            self.held = held

    assert run(Quiet(0, ranks)) == rule.staging(numel, ranks)


def test_staging_has_its_own_line_in_a_run_and_in_its_estimate() -> None:
    def run(group: Group) -> Report:
        return train(group, LLAMA, make_mesh(2), reduction=REDUCTIONS["bfloat16"](), placement=zero2())

    report = run_threads(2, run)[0]
    assert report.peak["staging"] > 0 == report.present["staging"]
    model = decoder(LLAMA)
    ids = ((SHARE, SEQ), torch.int64)
    (foreseen,) = estimate(
        Run(
            units=model.units, loss=model.loss, ties=model.ties, mesh=make_mesh(2), inputs=ids, targets=ids,
            order=add_communication(schedules.NAMED["1f1b"](1, 1)), optimizer=AdamW(), placement=zero2(),
            reduction=REDUCTIONS["bfloat16"](),
        )
    )  # fmt: skip
    assert foreseen.peak["staging"] == report.peak["staging"]
    assert foreseen.total == pytest.approx(report.total, rel=0.05)


def test_a_sharded_model_is_never_whole_while_it_is_built() -> None:
    """64 units of 64 KiB over 4 ranks: half of them are the shards of parameters and gradients; besides there is one
    unit, the bucket it goes into with its gradients, and what threads copy of a broadcast, 4 to 12 units in all."""
    unit, units, ranks = 4 * 128 * 128, 64, 4
    peaks: list[int] = []

    def run(group: Group) -> None:
        with Watching() as watching:
            Engine(
                [lambda scope: nn.Linear(128, 128, bias=False, device="cpu") for _ in range(units)],
                mean_loss(F.mse_loss), world=group, optimizer=SGD(momentum=0),
                placement=zero3().with_(bucket_bytes=unit),
            )  # fmt: skip
        peaks.append(watching.peak)

    run_threads(ranks, run)
    assert units * unit // 2 < max(peaks) < 0.75 * units * unit


class Watching(Alive):
    """The most that was alive at once; storages that were never written to count as well."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.peak = max(self.peak, self.bytes())
        return out


def test_an_impossible_budget_is_refused_before_the_first_step() -> None:
    ran = []

    class Told(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            ran.append(x.untyped_storage().nbytes() and not isinstance(x, FakeTensor))
            return super().forward(x)

    def run(group: Group) -> None:
        engine = Engine(
            [lambda scope: Told(64, 64) for _ in range(3)], mean_loss(F.mse_loss), world=group,
            placement=zero1().with_(activations="budget", activation_bytes=100),
        )  # fmt: skip
        x = torch.ones(8, 64)
        with pytest.raises(SetupError, match=r"activation_bytes = 100 cannot be reached: .* still holds \d+ bytes"):
            engine.step(x, x)
        assert engine.steps == 0

    run_threads(2, run)
    assert ran and not any(ran)
