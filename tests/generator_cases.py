"""Training a deep little decoder under any schedule: the shared body of the generators' tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parity_cases import SEQ, VOCAB, batch
from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.optim import AdamW
from triloom.placement import zero0, zero1
from triloom.schedules import Schedule

DEEP = {
    "llama": llama(vocab=VOCAB, hidden=12, layers=7, heads=6, kv_heads=6, ffn=18, max_seq=SEQ, tied=True),
    "gpt2": gpt2(vocab=VOCAB, hidden=12, layers=7, heads=6, max_seq=SEQ, dropout=0.1),
}
"""Nine units: two stages a rank on four ranks, three on three. One of them ties its embedding to its head."""


Outcome = tuple[list[float], dict[str, torch.Tensor]]
"""Losses of three steps and of an evaluation, and the weights."""


@dataclass(frozen=True)
class Run:
    model: str
    dp: int = 1
    pp: int = 1
    tp: int = 1
    microbatches: int = 3
    sharded: bool = True


def train(world: Group, run: Run, schedule: Schedule) -> Outcome:
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


def same_bits(
    got: tuple[list[float], dict[str, torch.Tensor]], want: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    assert got[0] == want[0]
    assert got[1].keys() == want[1].keys()
    for name, value in want[1].items():
        assert torch.equal(got[1][name], value), name
