"""Without masters: rounding by chance or with compensation, states in bf16; bits over stages and meshes, curves."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.memory import STATE
from triloom.mesh import make_mesh
from triloom.models import decoder, llama
from triloom.native import Pool
from triloom.optim import SGD, Adafactor, AdamW, AdamW8bit, Muon, Optimizer, TorchOptimizer
from triloom.parallel.build import mean_loss
from triloom.placement import NAMED, Placement, State, zero0, zero1, zero3
from triloom.rounding import _rounded, boxes, round_piece_, round_stochastic_
from triloom.shards import ShardSpec
from triloom_kernels.draws import indices, words

# ---------------------------------------------------------------- the rounding itself


def rounded(values: torch.Tensor, key: int, base: int = 0) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    return round_stochastic_(out, values, key, base, (1,))


def test_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    """Mean of 4096 draws of each value: within five standard errors of it, of which one step is 2^-7 of the value."""
    gen = torch.Generator().manual_seed(0)
    values = torch.randn(64, generator=gen) * 10.0 ** torch.randint(-8, 8, (64,), generator=gen)
    draws = torch.stack([rounded(values, key, 5) for key in range(4096)]).double()
    below = (values.view(torch.int32) & ~0xFFFF).view(torch.float32).double()
    above = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32).double()
    assert bool(((draws == below) | (draws == above)).all())
    up = (values.double() - below) / (above - below)
    error = (draws.mean(0) - values.double()) / (above - below)
    assert bool((error.abs() <= 5 * (up * (1 - up) / 4096).sqrt() + 1e-12).all())


def test_what_needs_no_rounding_stays() -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf"), 2.0**-133])
    assert torch.equal(rounded(exact, 1).float(), exact)
    assert bool(rounded(torch.full((64,), float("nan")), 1).isnan().all())
    payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)  # cut off it would be an infinity
    assert bool(rounded(payload, 1).isnan().all())


@pytest.mark.parametrize("n", [1, 3, 64, 1000, 70_001])
def test_native_equals_torch(n: int) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n))
    want = _rounded(values, words(indices(values, 7, (1,)), 99))
    for pool in (None, Pool(3)):
        out = torch.empty(n, dtype=torch.bfloat16)
        round_stochastic_(out, values, 99, 7, (1,), pool=pool)
        assert torch.equal(out, want)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_any_part_of_a_tensor_rounds_as_the_whole(shape: list[int], data: st.DataObject) -> None:
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    want = rounded(whole.reshape(-1), 11).view(shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[dim]), min_size=4, max_size=4)))
    spec = ShardSpec(tuple(shape), dim, ((cuts[0], cuts[1]), (cuts[2], cuts[3])))
    local = torch.cat([whole.narrow(dim, a, b - a) for a, b in spec.slices], dim).reshape(-1)
    mine = torch.cat([want.narrow(dim, a, b - a) for a, b in spec.slices], dim).reshape(-1)
    first = data.draw(st.integers(0, local.numel()))
    count = data.draw(st.integers(0, local.numel() - first))
    out = torch.zeros(count, dtype=torch.bfloat16)
    round_piece_(out, local[first : first + count], 11, spec, first)
    assert torch.equal(out, mine[first : first + count])
    assert sum(torch.Size(b.shape).numel() for b in boxes(spec, first, count)) == count


# ---------------------------------------------------------------- training

LOW = State(dtype="bfloat16")
WAYS: dict[str, dict[str, Any]] = {
    "stochastic": {"rounding": "stochastic"},
    "kahan": {"rounding": "kahan"},
    "masters, low states": {"optimizer": LOW},
    "stochastic, low states": {"rounding": "stochastic", "optimizer": LOW},
    "kahan, low states": {"rounding": "kahan", "optimizer": LOW},
}


def row(base: Placement, way: str) -> Placement:
    changes = dict(WAYS[way])
    if "optimizer" in changes:
        changes["optimizer"] = State(sharded=base.optimizer.sharded, dtype="bfloat16")
    return base.with_(**changes, cadence="step", bucket_bytes=6000)


def train(
    group: Group, placement: Placement, optimizer: Optimizer, steps: int = 3, mesh: dict[str, int] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = decoder(llama(vocab=43, hidden=24, layers=2, heads=4, kv_heads=4, ffn=36, max_seq=12))
    engine = Engine(
        model.units, model.loss, world=group, mesh=make_mesh(group.size, **(mesh or {})), placement=placement,
        optimizer=optimizer, dtype=torch.bfloat16, seed=4,
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(steps):
        ids = (torch.arange(4 * 13).view(4, 13) * (step + 3)) % 43
        mine = ids.tensor_split(dp.size)[dp.rank]
        losses.append(engine.step(mine[:, :-1].contiguous(), mine[:, 1:].contiguous()).loss)
    return losses, engine.full_state()


RULES: dict[str, Optimizer] = {
    "adamw": AdamW(lr=0.01),
    "muon": Muon(lr=0.01),
    "adafactor": Adafactor(lr=0.01),
    "nadam": TorchOptimizer(torch.optim.NAdam, lr=0.01),
}


@pytest.mark.parametrize("way,rule", [*((w, "adamw") for w in WAYS), *(("kahan, low states", r) for r in RULES),
                                      ("stochastic, low states", "muon")])  # fmt: skip
def test_stages_agree_bit_for_bit(way: str, rule: str) -> None:
    want: Any = None
    for base in (zero0(), NAMED["zero2"](), zero3()):
        for got in run_threads(2, partial(train, placement=row(base, way), optimizer=RULES[rule])):
            want = want or got
            assert got[0] == want[0] and all(torch.equal(got[1][k], want[1][k]) for k in want[1])
    assert all(t.dtype == torch.bfloat16 for t in want[1].values())


def test_draws_do_not_depend_on_the_mesh() -> None:
    """With gradients of zero the update is weight decay alone, so the meshes differ in their draws only, if at all."""

    class Zero(nn.Module):
        def forward(self, x: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return (x.float() * 0).sum(), torch.tensor(1.0)

        def weight(self, targets: Any) -> torch.Tensor:
            return torch.tensor(1.0)

    def run(group: Group, **mesh: int) -> dict[str, torch.Tensor]:
        model = decoder(llama(vocab=40, hidden=24, layers=2, heads=4, kv_heads=4, ffn=36, max_seq=12))
        engine = Engine(
            model.units, Zero(), world=group, mesh=make_mesh(group.size, **mesh), seed=4, dtype=torch.bfloat16,
            optimizer=SGD(lr=0.1, weight_decay=0.05, momentum=0.0), placement=zero1().with_(rounding="stochastic"),
        )  # fmt: skip
        ids = torch.zeros(4, 12, dtype=torch.int64)
        for _ in range(3):
            engine.step(ids, ids)
        return engine.full_state()

    alone = run(Solo())
    for ranks, mesh in ((2, {"tp": 2}), (2, {"pp": 2}), (3, {})):
        for got in run_threads(ranks, partial(run, **mesh)):
            assert all(torch.equal(got[name], value) for name, value in alone.items())


@cache
def curve(way: str | None) -> list[float]:
    """60 steps of a small GPT; fp32 without a way, otherwise bf16 throughout."""
    model = decoder(llama(vocab=31, hidden=32, layers=2, heads=4, max_seq=16))
    placement = zero1() if way is None else row(zero1(), way)
    engine = Engine(
        model.units, model.loss, optimizer=AdamW(lr=2e-3, betas=(0.9, 0.99), weight_decay=0.01), seed=3,
        placement=placement, dtype=torch.float32 if way is None else torch.bfloat16,
    )  # fmt: skip
    losses = []
    for step in range(60):
        gen = torch.Generator().manual_seed(step)
        first = torch.randint(0, 31, (8, 1), generator=gen)
        ids = (first + torch.arange(17) * (1 + first % 3)) % 31
        losses.append(engine.step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).loss)
    return losses


@pytest.mark.parametrize("way", WAYS)
def test_curves_stay_near_fp32(way: str) -> None:
    """From 3.4 to below 1: the mean of the last ten losses within 0.06 of fp32's."""
    want = sum(curve(None)[-10:]) / 10
    assert curve(None)[0] > 3 and want < 1.2
    assert sum(curve(way)[-10:]) / 10 == pytest.approx(want, abs=0.06)


def test_small_updates_are_lost_without_either() -> None:
    """A parameter of 1 that loses 2^-12 a step for 256 steps: to the nearest it stays, otherwise it becomes 15/16."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    def run(rounding: str) -> float:
        engine = Engine(
            [One()], mean_loss(lambda y, t: y.float().sum()), optimizer=SGD(lr=2.0**-12, momentum=0), clip=None,
            placement=zero1().with_(rounding=rounding),
        )  # fmt: skip
        for _ in range(256):
            engine.step(torch.ones(1, 512, dtype=torch.bfloat16), torch.zeros(1))
        return float(engine.full_state()["0.w"].double().mean())

    assert run("kahan") == pytest.approx(15 / 16, abs=2**-9)
    assert run("stochastic") == pytest.approx(15 / 16, abs=2**-9)
    assert run("master") == pytest.approx(15 / 16, abs=2**-9)


def test_bytes_of_every_way() -> None:
    """bf16 gradients: 2 + 2, and for stochastic 8 (4), for Kahan 2 more, for masters 4 more."""
    wanted = {"stochastic": 12, "kahan": 14, "masters, low states": 12, "stochastic, low states": 8,
              "kahan, low states": 10}  # fmt: skip
    for way, each in wanted.items():
        placement = row(zero0(), way).with_(grads=State(dtype="bfloat16"))
        units = [nn.Linear(64, 64).bfloat16()]
        memory = Engine(units, mean_loss(F.mse_loss), placement=placement, optimizer=AdamW()).memory()
        assert sum(memory.present[kind] for kind in STATE) == each * (64 * 64 + 64), way
        masters = {"stochastic": 0, "kahan": 2, "masters": 4}[way.split(",")[0]]
        assert memory.present["master"] == masters * (64 * 64 + 64), way


@pytest.mark.parametrize(
    "change,message",
    [
        ({"placement": zero1().with_(rounding="kahan")}, "rounding = 'kahan' is for bfloat16 parameters.*float32"),
        ({"placement": zero1().with_(optimizer=LOW), "optimizer": AdamW8bit()}, "8 bits already"),
        ({"placement": zero1().with_(optimizer=State(dtype="float64"))}, "optimizer.dtype = 'float64'"),
        (
            {"placement": zero1().with_(params=LOW)},
            "params.dtype = 'bfloat16', but the model has parameters in float32",
        ),
        ({"placement": zero1().with_(params=LOW), "dtype": torch.float64}, "leave one of them out"),
        ({"placement": zero1().with_(rounding="stochastic"), "half": True}, "float16 has not the range"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    unit = nn.Linear(4, 4)
    unit = unit.half() if change.pop("half", False) else unit
    with pytest.raises(ConfigError, match=message):
        Engine([unit], mean_loss(F.mse_loss), **change)


def test_rows_that_contradict_themselves() -> None:
    with pytest.raises(ConfigError, match="rounding 'up' is not one of master, stochastic, kahan"):
        zero1().with_(rounding="up")
    with pytest.raises(ConfigError, match="not for params.dtype = 'float32'"):
        zero1().with_(rounding="kahan", params=State(dtype="float32"))


@pytest.mark.parametrize("way,rule", [("kahan, low states", "adamw"), ("stochastic, low states", "muon")])
def test_a_checkpoint_goes_on_bit_for_bit_on_another_stage(way: str, rule: str, tmp_path: Path) -> None:
    """Four steps at once, and two and two with a checkpoint in between."""

    def run(group: Group, base: Placement, steps: range, load: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
        engine = Engine(
            [nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16()], mean_loss(F.mse_loss), world=group, seed=1,
            placement=row(base, way), optimizer=RULES[rule], dtype=torch.bfloat16,
        )  # fmt: skip
        if load:
            engine.load(tmp_path)
        else:
            with torch.no_grad(), engine.gathered():
                for m in engine.modules.values():
                    for p in m.parameters():
                        p.copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
        losses = []
        for step in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            losses.append(engine.step(*(t.tensor_split(2)[group.rank] for t in (x, x.tanh()))).loss)
        if len(steps) == 2 and not load:
            engine.save(tmp_path)
        return losses, engine.full_state()

    whole = run_threads(2, partial(run, base=zero1(), steps=range(4), load=False))[0]
    first = run_threads(2, partial(run, base=zero1(), steps=range(2), load=False))[0]
    then = run_threads(2, partial(run, base=zero3(), steps=range(2, 4), load=True))[0]
    assert first[0] + then[0] == whole[0]
    assert all(torch.equal(then[1][name], value) for name, value in whole[1].items())


@pytest.mark.parametrize("rounding", ["master", "kahan"])
def test_to_read_gathered_parameters_changes_nothing_and_to_write_them_counts(rounding: str) -> None:
    """What is kept besides the bf16 values stays, but for those that were written."""

    def run(group: Group, look: bool) -> list[float]:
        engine = Engine(
            [nn.Linear(8, 8).bfloat16()], mean_loss(F.mse_loss), world=group, dtype=torch.bfloat16,
            placement=zero3().with_(rounding=rounding), optimizer=SGD(lr=1e-3),
        )  # fmt: skip
        with engine.gathered(), torch.no_grad():
            engine.modules[0].weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
            engine.modules[0].bias.fill_(1.0)
        losses = []
        for step in range(12):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
            losses.append(engine.step(*(t.tensor_split(2)[group.rank] for t in (x, x))).loss)
            if look:
                with engine.gathered():
                    assert engine.modules[0].weight.isfinite().all()
        with engine.gathered(), torch.no_grad():
            engine.modules[0].weight[0].fill_(3.0)
        kind = "master" if rounding == "master" else "compensation"
        kept = engine.full_state(kind)["0.weight"]
        assert bool((kept[0] == (3.0 if rounding == "master" else 0.0)).all())
        assert bool((kept[1:].float() != engine.full_state()["0.weight"][1:].float()).any())
        return losses

    assert run_threads(2, partial(run, look=True)) == run_threads(2, partial(run, look=False))
