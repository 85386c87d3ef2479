"""Steps that must not happen: inf and NaN on one rank, fp16 overflow; and the norms that find them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity_cases import MODELS, batch
from triloom.engine import Engine, Metrics
from triloom.errors import ConfigError, DivergedError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss
from triloom.parallel.norms import Clip
from triloom.placement import NAMED
from triloom.scaling import Scaling, after, dynamic, fixed, start

BAD_STEP, ATTEMPTS = 7, 9


class Poison(nn.Module):
    """Identity whose gradient is ``value`` in one place while ``armed()``."""

    def __init__(self, armed: Callable[[], bool], value: float) -> None:
        super().__init__()
        self.armed, self.value = armed, value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and self.armed():
            x = x.clone()
            x.register_hook(self._spoil)
        return x

    def _spoil(self, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[0] = self.value
        return grad


def everything(engine: Engine) -> dict[tuple[str, str], torch.Tensor]:
    kinds = ("params", "exp_avg", "exp_avg_sq")
    return {(kind, name): t.clone() for kind in kinds for name, t in engine.full_state(kind).items()}


@pytest.mark.parametrize("placement", NAMED)
@pytest.mark.parametrize("dp,pp,tp,value", [(3, 1, 1, math.nan), (2, 2, 1, math.inf), (1, 2, 2, math.inf)])
def test_all_ranks_skip_the_same_step(placement: str, dp: int, pp: int, tp: int, value: float) -> None:
    def run(group: Group) -> list[Metrics]:
        model = decoder(MODELS["gpt2"])
        attempt = -1
        units = dict(model.units)
        bad = group.rank == group.size - 1
        units["poison"] = Poison(lambda: bad and attempt == BAD_STEP, value)
        engine = Engine(
            units,
            model.loss,
            ties=model.ties,
            world=group,
            mesh=make_mesh(group.size, dp=dp, pp=pp, tp=tp),
            placement=NAMED[placement](),
            microbatches=2,
            optimizer=AdamW(lr=lambda step: 0.01 / (step + 1)),
        )
        out = []
        for attempt in range(ATTEMPTS):
            before = everything(engine)
            out.append(engine.step(*(t.tensor_split(dp)[engine.groups.axis("dp").rank] for t in batch(attempt))))
            now = everything(engine)
            changed = [key for key in now if not torch.equal(now[key], before[key])]
            assert (not changed) == (attempt == BAD_STEP)
        assert [m.step for m in out] == [*range(BAD_STEP + 1), *range(BAD_STEP, ATTEMPTS - 1)]
        assert [m.lr for m in out] == [0.01 / (m.step + 1) for m in out]
        assert [m.skipped for m in out] == [attempt == BAD_STEP for attempt in range(ATTEMPTS)]
        assert "first in " in out[BAD_STEP].note and " on rank " in out[BAD_STEP].note
        engine.close()
        return out

    results = run_threads(dp * pp * tp, run)
    assert all(str(r) == str(results[0]) for r in results)


@pytest.mark.parametrize("most", [2, 10])
def test_too_many_in_a_row_end_the_run_on_every_rank(most: int) -> None:
    def run(group: Group) -> None:
        units = [nn.Linear(4, 4), Poison(lambda: group.rank == 1, math.inf)]
        scaling = None if most == fixed().max_skips else fixed(max_skips=most)
        engine = Engine(units, mean_loss(F.mse_loss), world=group, scaling=scaling)
        x = torch.ones(2, 4)
        assert [engine.step(x, x).skipped for _ in range(most)] == [True] * most
        says = rf"first in 0\.\w+ on rank \d; {most + 1} steps in a row \(max_skips={most}\)"
        with pytest.raises(DivergedError, match=says):
            engine.step(x, x)
        assert engine.steps == 0

    run_threads(3, run)


@pytest.mark.parametrize("mesh,placement", [({}, "zero1"), ({"pp": 2}, "zero2"), ({}, "zero3")])
def test_fp16_scale_halves_and_recovers(mesh: dict[str, int], placement: str) -> None:
    """Starts far too high: halves until nothing overflows, then grows after ``interval`` good steps."""

    def run(group: Group) -> list[Metrics]:
        model = decoder(MODELS["llama"])
        engine = Engine(
            model.units,
            model.loss,
            world=group,
            mesh=make_mesh(group.size, **mesh),
            dtype=torch.float16,
            placement=NAMED[placement](),
            microbatches=2,
            scaling=dynamic(2.0**24, interval=4, max_skips=20),
            optimizer=AdamW(lr=1e-3),
        )
        dp = engine.groups.axis("dp")
        return [engine.step(*(t.tensor_split(dp.size)[dp.rank] for t in batch(0))) for _ in range(24)]

    for metrics in run_threads(2, run):
        skipped = [m.skipped for m in metrics]
        first = skipped.index(False)
        assert first >= 1 and all(skipped[:first])
        assert [m.scale for m in metrics[: first + 1]] == [2.0 ** (24 - i) for i in range(first + 1)]
        assert metrics[first + 4].scale == 2 * metrics[first].scale
        good = [m for m in metrics if not m.skipped]
        assert good[-1].loss < good[0].loss
        assert all(math.isfinite(m.grad_norm) for m in good)


def test_scaling_changes_no_bit_where_nothing_overflows() -> None:
    def losses(scale: float) -> list[tuple[float, float]]:
        model = decoder(MODELS["llama"])
        rule = Scaling(initial=scale, largest=2.0**30)
        engine = Engine(model.units, model.loss, scaling=rule, optimizer=AdamW(lr=1e-2))
        return [(m.loss, m.grad_norm) for m in (engine.step(*batch(i)) for i in range(4))]

    assert losses(1.0) == losses(2.0**12)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dp,pp,tp", [(2, 2, 1), (1, 2, 2), (3, 1, 1)])
def test_norms_of_every_order_equal_torch(order: float, dp: int, pp: int, tp: int) -> None:
    """With tied, tp-sharded and tp-replicated parameters, and clipping that bites."""

    def run(group: Group, mesh: tuple[int, int, int]) -> tuple[list[float], dict[str, torch.Tensor]]:
        model = decoder(MODELS["gpt2"])
        engine = Engine(
            model.units,
            model.loss,
            ties=model.ties,
            world=group,
            placement=NAMED["zero2"](),
            seed=3,
            mesh=make_mesh(group.size, dp=mesh[0], pp=mesh[1], tp=mesh[2]),
            microbatches=2,
            clip=Clip(0.01, order),
            dtype=torch.float64,
            optimizer=AdamW(lr=1e-2, betas=(0.0, 0.9)),
        )
        rank = engine.groups.axis("dp").rank
        norms = [engine.step(*(t.tensor_split(mesh[0])[rank] for t in batch(i))).grad_norm for i in range(2)]
        return norms, engine.full_state("exp_avg")

    alone, moments = run_threads(1, lambda g: run(g, (1, 1, 1)))[0]
    clipped = torch.cat([m.flatten() for m in moments.values()])
    assert float(torch.linalg.vector_norm(clipped, order)) == pytest.approx(0.01, rel=1e-3)
    for norms, _ in run_threads(dp * pp * tp, lambda g: run(g, (dp, pp, tp))):
        assert norms == pytest.approx(alone, rel=1e-10)


def test_the_rule() -> None:
    rule = dynamic(8.0, interval=2, max_skips=1)
    state = start(rule)
    scales = []
    for finite in (True, True, False, False, False, False, True, True):
        state = after(rule, state, finite)
        scales.append((state.scale, state.skips))
    assert scales == [(8, 0), (16, 0), (8, 1), (4, 2), (2, 3), (1, 4), (1, 0), (2, 0)]


@pytest.mark.parametrize(
    "values,message",
    [
        ({"backoff": 0.0}, "backoff"),
        ({"initial": 0.5}, "smallest"),
        ({"interval": 0}, "interval"),
        ({"growth": 0.5}, "growth"),
    ],
)
def test_bad_rules(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scaling(**values)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="clip must be above 0"):
        Clip(0.0)
    with pytest.raises(ConfigError, match="order"):
        Clip(1.0, 3.0)
