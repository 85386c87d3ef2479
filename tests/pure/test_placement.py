"""The placement table: named rows, and what a row may not say."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from parity_cases import MODELS, batch
from triloom.engine import Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.memory import Report
from triloom.mesh import make_mesh
from triloom.models import decoder
from triloom.optim import AdamW
from triloom.placement import NAMED, Placement, State, hsdp, zero0, zero2, zero3


def test_named_rows_differ_in_their_columns_only() -> None:
    columns = {
        name: (p.params.sharded, p.grads.sharded, p.optimizer.sharded)
        for name, p in ((n, f()) for n, f in NAMED.items())
    }
    assert columns == {
        "zero0": (False, False, False),
        "zero1": (False, False, True),
        "zero2": (False, True, True),
        "zero3": (True, True, True),
    }
    assert all(NAMED[name]().name == name for name in NAMED)
    assert hsdp(2) == zero3().with_(name="hsdp", shard_ranks=2)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"grads": State(sharded=True)}, "zero2"),
        ({"params": State(sharded=True)}, "zero3"),
        ({"optimizer": State(dtype="float16")}, "optimizer.dtype = 'float16'"),
        ({"rounding": "up"}, "rounding 'up' is not one of master, stochastic, kahan"),
        ({"cadence": "sometimes"}, "cadence 'sometimes' is not one of step, microbatch"),
        ({"prefetch": -1}, "prefetch"),
        ({"shard_ranks": 0}, "shard_ranks"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"activations": "forget"}, "activations"),
    ],
)
def test_rows_that_cannot_work_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zero0().with_(**change)


def test_unknown_dtypes_and_tiers_are_refused() -> None:
    with pytest.raises(ConfigError, match="int8"):
        State(dtype="int8")
    with pytest.raises(ConfigError, match="nvme"):
        State(tier="nvme")


# ---------------------------------------------------------------- small parameters that stay whole


def test_what_persists_changes_no_bit_and_is_gathered_after_the_step_only() -> None:
    def run(group: Group, placement: Placement, pp: int) -> tuple[list[float], dict[str, torch.Tensor], Report, int]:
        model = decoder(MODELS["gpt2"])
        engine = Engine(
            model.units, model.loss, ties=model.ties, world=group, placement=placement, microbatches=2, clip=0.7,
            mesh=make_mesh(group.size, pp=pp), optimizer=AdamW(lr=0.01),
        )  # fmt: skip
        dp = engine.groups.axis("dp")
        losses = []
        for step in range(3):
            mine = [t.tensor_split(dp.size)[dp.rank] for t in batch(step)]
            losses.append(engine.step(*mine).loss)
        engine.evaluate(*mine)
        return losses, engine.full_state(), engine.memory(), len(engine.program.ranks[0])

    for ranks, pp in ((2, 1), (4, 2)):
        want = run_threads(ranks, partial(run, placement=zero3().with_(bucket_bytes=2000), pp=pp))
        for persist in (30, 700, 10**9):
            placement = zero3().with_(bucket_bytes=2000, persist=persist)
            for got, one in zip(run_threads(ranks, partial(run, placement=placement, pp=pp)), want, strict=True):
                assert got[0] == one[0] and all(torch.equal(got[1][k], one[1][k]) for k in one[1])
                assert got[2].present["params"] > one[2].present["params"]
        assert got[2].peak["gathered"] == 0
        assert got[3] < one[3]


def test_a_small_parameter_persists_by_its_size_in_the_whole_model() -> None:
    with pytest.raises(ConfigError, match="persist = 5 is of sharded parameters: use zero3"):
        zero2().with_(persist=5)
    with pytest.raises(ConfigError, match="persist must be a number of elements"):
        zero3().with_(persist=-1)
