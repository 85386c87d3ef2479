"""Every generator through the engine on the Threads group: the schedule does not change a bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch

from parity_cases import SEQ, VOCAB, batch
from triloom import schedules
from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.optim import AdamW
from triloom.placement import zero0, zero1
from triloom.schedules import NAMED, Schedule, interleaved
from triloom.search import automatic
from triloom.simulate import Costs

DEEP = {
    "llama": llama(vocab=VOCAB, hidden=12, layers=7, heads=6, kv_heads=6, ffn=18, max_seq=SEQ, tied=True),
    "gpt2": gpt2(vocab=VOCAB, hidden=12, layers=7, heads=6, max_seq=SEQ, dropout=0.1),
}
"""Nine units: two stages a rank on four ranks, three on three. One of them ties its embedding to its head."""

GENERATORS: dict[str, Schedule] = {name: make for name, make in NAMED.items() if name != "forward"}


@dataclass(frozen=True)
class Run:
    model: str
    dp: int = 1
    pp: int = 1
    tp: int = 1
    microbatches: int = 3
    sharded: bool = True


def train(world: Group, run: Run, schedule: Schedule) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of three steps and of an evaluation, and the weights."""
    model = decoder(DEEP[run.model])
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=world, optimizer=AdamW(lr=0.02, eps=1e-4), clip=0.7, seed=11,
        mesh=make_mesh(world.size, dp=run.dp, pp=run.pp, tp=run.tp), schedule=schedule, microbatches=run.microbatches,
        placement=(zero1() if run.sharded else zero0()).with_(bucket_bytes=4096), sequence_parallel=run.tp > 1,
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    losses = []
    for step in range(4):
        inputs, targets = (t.tensor_split(dp.size)[dp.rank].contiguous() for t in batch(step))
        losses.append((engine.step if step < 3 else engine.evaluate)(inputs, targets).loss)
    state = engine.full_state()
    engine.close()
    return losses, state


@cache
def one_f_one_b(run: Run) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    return run_threads(run.dp * run.pp * run.tp, lambda group: train(group, run, schedules.one_f_one_b))


def check(run: Run, schedule: Schedule) -> None:
    got = run_threads(run.dp * run.pp * run.tp, lambda group: train(group, run, schedule))
    for (losses, state), (want_losses, want) in zip(got, one_f_one_b(run), strict=True):
        assert losses == want_losses
        assert state.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", GENERATORS)
def test_same_bits_as_1f1b(name: str, pp: int) -> None:
    for microbatches in sorted({1, pp - 1, 7} - {0}) if pp > 1 else [3]:
        check(Run("llama", pp=pp, microbatches=microbatches), GENERATORS[name])


@pytest.mark.parametrize("name", GENERATORS)
def test_same_bits_on_all_axes(name: str) -> None:
    """Dropout, tensor and sequence parallelism, data parallelism with and without sharding."""
    check(Run("gpt2", dp=2, pp=2, tp=2), GENERATORS[name])
    check(Run("llama", dp=2, pp=3, sharded=False), GENERATORS[name])


@pytest.mark.parametrize("make", [interleaved, schedules.breadth_first])
def test_same_bits_with_more_stages_a_rank(make: Schedule) -> None:
    for v, pp in ((3, 3), (4, 2), (9, 1)):
        check(Run("llama", pp=pp, microbatches=4), partial(make, v=v))


def test_same_bits_with_a_program_from_the_search() -> None:
    costs = Costs(F=[1, 2, 1], B=[1, 1, 2], W=[1, 1, 1], comm=0.2)
    check(Run("llama", pp=3, microbatches=5), automatic(costs, memory=4, effort=50_000))
    check(Run("gpt2", pp=2, microbatches=4), automatic(Costs(comm=0.1), memory=2.5, effort=50_000))
