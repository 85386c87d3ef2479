"""Training the decoder on a mesh, against the same on one rank: the shared body of the parity tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from triloom.engine import Engine
from triloom.groups.base import Group
from triloom.mesh import Mesh, make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.models.config import DecoderConfig
from triloom.optim import AdamW, warmup_cosine
from triloom.placement import NAMED, Placement

SEQ, BATCH, VOCAB = 12, 12, 43
"""43 is prime: no tp divides the vocabulary."""

MODELS: dict[str, DecoderConfig] = {
    "llama": llama(vocab=VOCAB, hidden=24, layers=3, heads=6, kv_heads=6, ffn=36, max_seq=SEQ),
    "llama_gqa_tied": llama(vocab=VOCAB, hidden=24, layers=3, heads=12, kv_heads=6, ffn=24, max_seq=SEQ, tied=True),
    "gpt2": gpt2(vocab=VOCAB, hidden=24, layers=3, heads=6, max_seq=SEQ, dropout=0.1),
}


@dataclass(frozen=True)
class Case:
    """One run. Plain values, so that a case can be shipped to ranks as JSON."""

    model: str
    dp: int = 1
    pp: int = 1
    tp: int = 1
    sequence: bool = False
    schedule: str = "1f1b"
    microbatches: int = 1
    placement: str = "zero1"
    bucket_bytes: int = 4096
    steps: int = 4
    dtype: str = "float64"
    stages: tuple[int, ...] | None = None
    order: tuple[str, str, str] = ("dp", "pp", "tp")
    cadence: str | None = None
    """None: the placement's."""
    recompute: bool = False
    shard_ranks: int | None = None

    @property
    def ranks(self) -> int:
        return self.dp * self.pp * self.tp

    def alone(self) -> Case:
        """The same training on one rank, microbatch by microbatch."""
        return Case(self.model, microbatches=self.microbatches, steps=self.steps, dtype=self.dtype, placement="zero0")

    def mesh(self) -> Mesh:
        return make_mesh(self.ranks, dp=self.dp, pp=self.pp, tp=self.tp, order=self.order)

    def rows(self) -> Placement:
        row = NAMED[self.placement]()
        activations = "recompute" if self.recompute else "keep"
        cadence = self.cadence or row.cadence
        return row.with_(
            bucket_bytes=self.bucket_bytes, cadence=cadence, activations=activations, shard_ranks=self.shard_ranks
        )


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    params: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    """First moments after the first step: a tenth of the clipped gradient."""


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch; ignored targets are spread unevenly, one sample is ignored altogether."""
    gen = torch.Generator().manual_seed(700 + step)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ + 1), generator=gen)
    targets = ids[:, 1:].clone()
    targets[0] = -100
    targets[1, : SEQ // 2] = -100
    targets[-1, 3:5] = -100
    return ids[:, :-1].contiguous(), targets


def train(world: Group, case: Case, between: Callable[[int], None] = lambda step: None) -> Outcome:
    """Run a case on the ranks of ``world``; ``between(step)`` is called after every step."""
    model = decoder(MODELS[case.model])
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=case.mesh(), schedule=case.schedule,
        microbatches=case.microbatches, placement=case.rows(), sequence_parallel=case.sequence, stages=case.stages,
        optimizer=AdamW(lr=warmup_cosine(0.02, warmup=2, steps=8), betas=(0.9, 0.95), eps=1e-4),
        clip=0.7, seed=11, dtype=getattr(torch, case.dtype),
    )  # fmt: skip
    dp = engine.groups.axis("dp")
    out = Outcome([], [], {}, {})
    for step in range(case.steps):
        inputs, targets = (t.tensor_split(dp.size)[dp.rank].contiguous() for t in batch(step))
        metrics = engine.step(inputs, targets)
        out.losses.append(metrics.loss)
        out.norms.append(metrics.grad_norm)
        if step == 0:
            out.moments.update({k: v.clone() for k, v in engine.full_state("exp_avg").items()})
        between(step)
    out.params.update(engine.full_state())
    engine.close()
    return out


def compare(got: Outcome, want: Outcome, *, rtol: float, atol: float) -> None:
    torch.testing.assert_close(torch.tensor(got.losses), torch.tensor(want.losses), rtol=rtol, atol=atol)
    torch.testing.assert_close(torch.tensor(got.norms), torch.tensor(want.norms), rtol=10 * rtol, atol=atol)
    for what in ("moments", "params"):
        one: dict[str, Any] = getattr(got, what)
        two: dict[str, Any] = getattr(want, what)
        assert one.keys() == two.keys()
        for name in two:
            torch.testing.assert_close(
                one[name], two[name], rtol=10 * rtol, atol=atol, msg=lambda m, n=name, w=what: f"{w} {n}: {m}"
            )


def same_bits(got: Outcome, want: Outcome) -> None:
    assert got.losses == want.losses and got.norms == want.norms
    for name, value in want.params.items():
        assert torch.equal(got.params[name], value), name
    for name, value in want.moments.items():
        assert torch.equal(got.moments[name], value), name
