"""Hybrid sharding: equal to one rank, memory of a shard group, replicas equal."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from parity_cases import MODELS, Case, batch, compare, train
from triloom.engine import Engine
from triloom.errors import MeshError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.models import decoder
from triloom.placement import hsdp, zero3


@pytest.mark.parametrize("shard_ranks,placement", [(2, "zero1"), (2, "zero3"), (1, "zero2"), (3, "zero0")])
@pytest.mark.parametrize("dp,pp,tp", [(6, 1, 1)])
def test_equals_one_rank(shard_ranks: int, placement: str, dp: int, pp: int, tp: int) -> None:
    case = Case("gpt2", dp=dp, pp=pp, tp=tp, microbatches=2, placement=placement, shard_ranks=shard_ranks)
    alone = train(Solo(), case.alone())
    for outcome in run_threads(case.ranks, partial(train, case=case)):
        compare(outcome, alone, rtol=1e-11, atol=1e-12)


def test_composes_with_pipeline_and_tensor_parallelism() -> None:
    case = Case("llama", dp=4, pp=2, tp=2, microbatches=2, placement="zero3", shard_ranks=2, sequence=True, steps=3)
    alone = train(Solo(), case.alone())
    for outcome in run_threads(case.ranks, partial(train, case=case)):
        compare(outcome, alone, rtol=1e-11, atol=1e-12)


def test_memory_is_that_of_the_shard_group() -> None:
    def run(group: Group, placement: object) -> dict[str, int]:
        model = decoder(MODELS["llama"])
        engine = Engine(model.units, model.loss, world=group, placement=placement, dtype=torch.float64)  # type: ignore[arg-type]
        engine.step(*(t.tensor_split(group.size)[group.rank] for t in batch(0)))
        return engine.memory().present

    whole = run_threads(2, partial(run, placement=zero3()))[0]
    hybrid = run_threads(4, partial(run, placement=hsdp(2)))[0]
    assert hybrid["params"] == whole["params"] and hybrid["moments"] == whole["moments"] > 0


def test_shard_ranks_must_divide_dp() -> None:
    def run(group: Group) -> None:
        model = decoder(MODELS["llama"])
        with pytest.raises(MeshError, match="shard_ranks=2 does not divide data-parallel ranks dp=3"):
            Engine(model.units, model.loss, world=group, placement=hsdp(2))

    run_threads(3, run)
