"""Replicated parameters: a weight changed on one rank is found, named with its ranks, and told by every rank."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from parity_cases import MODELS, Case
from triloom import boot
from triloom.config import load
from triloom.engine import Engine, Metrics
from triloom.errors import DivergedError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.models import decoder
from triloom.replicas import CHUNK, check_replicas, fingerprint
from triloom.runlog import read_metrics
from triloom.train import train

BIAS = "blocks.1.attention.out.bias"
"""Whole on every rank of tp."""
SPLIT = "blocks.1.mlp.up.weight"


def build(world: Group, case: Case) -> Engine:
    model = decoder(MODELS[case.model])
    return Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=case.mesh(), microbatches=case.microbatches,
        placement=case.rows(), sequence_parallel=case.sequence, seed=3, dtype=getattr(torch, case.dtype),
    )  # fmt: skip


def spoil(engine: Engine, name: str) -> None:
    """Change the last bit of one element of what this rank holds of a parameter, if it holds some."""
    for b in engine.state.buckets:
        for slot in b.bucket.slots:
            if slot.name == name:
                sharded = b.residency.params
                held = b.param_shard if sharded else b.params.tensor
                lo, hi = (b.shard.start, b.shard.stop) if sharded else (0, b.bucket.numel)
                if max(lo, slot.offset) < min(hi, slot.stop):
                    at = max(lo, slot.offset) - lo
                    held[at : at + 1].view(torch.int32).bitwise_xor_(1)


CASES: list[tuple[Case, int, str, str]] = [
    (Case("gpt2", dp=2, dtype="float32"), 1, SPLIT, f"{SPLIT} .over dp.: rank 0: .*; rank 1: "),
    (Case("gpt2", dp=3, dtype="float32", placement="zero0"), 0, SPLIT, r"over dp.: rank 0: \w+; ranks 1, 2: "),
    (Case("gpt2", tp=2, dtype="float32"), 1, BIAS, f"{BIAS} .over tp.: rank 0: .*; rank 1"),
    (Case("gpt2", dp=2, tp=2, dtype="float32", placement="zero3"), 3, BIAS, "over tp.: rank 2: .*; rank 3: "),
    (Case("gpt2", pp=2, dtype="float32"), 0, "embed.tokens.weight", "over its uses.: rank 0: .*; rank 1: "),
    (Case("gpt2", pp=2, tp=2, dtype="float32"), 3, "embed.tokens.weight", "uses.: rank 1: .*; rank 3: "),
    (Case("llama", dp=4, shard_ranks=2, dtype="float32", placement="zero3"), 2, SPLIT, "dp.: rank 0: .*; rank 2: "),
]


@pytest.mark.parametrize(("case", "rank", "name", "message"), CASES)
def test_a_bit_on_one_rank_is_told_by_all(case: Case, rank: int, name: str, message: str) -> None:
    def body(world: Group) -> None:
        engine = build(world, case)
        assert check_replicas(engine) > 0
        if world.rank == rank:
            spoil(engine, name)
        with pytest.raises(DivergedError, match=f"before step 0, ranks hold different values .*{message}"):
            check_replicas(engine)

    run_threads(case.ranks, body)


def test_what_has_no_second_copy_is_not_counted() -> None:
    def count(case: Case) -> list[int]:
        return run_threads(case.ranks, lambda world: check_replicas(build(world, case)))

    assert count(Case("llama")) == [0]
    assert count(Case("llama", dp=2, placement="zero3")) == [0, 0]
    assert count(Case("llama", pp=2)) == [0, 0]
    norms = 2 * 3 + 1
    assert count(Case("llama", tp=2)) == [norms, norms]
    all_of_it = len(run_threads(1, lambda world: build(world, Case("llama")).state.params)[0])
    assert count(Case("llama", dp=2, placement="zero2")) == [all_of_it, all_of_it]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_single_change_moves_the_fingerprint(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(70, generator=draw).to(dtype)
    before = int(fingerprint(values))
    seen = {before}
    change: Callable[[int], torch.Tensor] = lambda i: torch.where(torch.arange(70) == i, -values, values)  # noqa: E731
    seen |= {int(fingerprint(change(i))) for i in range(70)}
    assert len(seen) == 71
    swapped = values.clone()
    swapped[3], swapped[40] = values[40], values[3]
    assert int(fingerprint(swapped)) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_add_up_across_chunks(dtype: torch.dtype) -> None:
    values = torch.arange(2 * CHUNK + 5, dtype=dtype)
    cut = CHUNK + 7
    parts = fingerprint(values[:cut]) + fingerprint(values[cut:], cut)
    assert torch.equal(fingerprint(values), parts)


def test_a_run_checks_every_so_many_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight changes on rank 1 while step 2 is under way; the check before step 4 is the next one."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    words = f"--model.layers 1 --model.hidden 8 --model.heads 2 --model.seq 8 --train.batch 4 --data.path {tmp_path}"
    words += f" --placement.name zero0 --check.replicas 2 --run.dir {tmp_path / 'run'} --train.threads 1"

    def step(engine: Engine, *batch: torch.Tensor) -> Metrics:
        metrics = plain(engine, *batch)
        if metrics.step == 2 and engine.world.rank == 1:
            spoil(engine, "blocks.0.mlp.up.weight")
        return metrics

    plain = Engine.step
    monkeypatch.setattr(Engine, "step", step)

    def body(group: Group) -> None:
        world = boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=0, local_size=1)
        with pytest.raises(
            DivergedError, match="before step 4, .* blocks.0.mlp.up.weight .over dp.: rank 0: .*; rank 1"
        ):
            train(load(words.split()).config, world, out=io.StringIO())

    before = torch.get_num_threads()
    try:
        run_threads(2, body)
    finally:
        torch.set_num_threads(before)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4
