"""A small model trained, saved and loaded: the shared body of the checkpoint tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

import parity_cases as parity
from triloom.checkpoint import read_manifest, read_tensor
from triloom.checkpoint.content import OWN
from triloom.engine import Engine, Metrics
from triloom.groups.base import Group
from triloom.groups.solo import Solo as Solo
from triloom.models import decoder
from triloom.optim import AdamW, Optimizer, warmup_cosine

MODEL = "gpt2"
"""With dropout, biases and a tied embedding; 43 tokens, so that no tp divides the vocabulary."""


def make_engine(world: Group, case: parity.Case, optimizer: Optimizer | None = None, **options: Any) -> Engine:
    model = decoder(parity.MODELS[case.model])
    default = AdamW(lr=warmup_cosine(0.02, warmup=2, steps=30), betas=(0.9, 0.95), eps=1e-4)
    return Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=case.mesh(), schedule=case.schedule,
        microbatches=case.microbatches, placement=case.rows(), sequence_parallel=case.sequence,
        optimizer=optimizer or default, clip=0.7, seed=11, dtype=getattr(torch, case.dtype), **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Steps:
    """What steps reported, every bit of it."""

    losses: list[str]
    norms: list[str]


def step(engine: Engine) -> Metrics:
    """One step on the batch of its number."""
    dp = engine.groups.axis("dp")
    inputs, targets = (t.tensor_split(dp.size)[dp.rank].contiguous() for t in parity.batch(engine.steps))
    return engine.step(inputs, targets)


def steps(engine: Engine, count: int) -> Steps:
    told = [step(engine) for _ in range(count)]
    return Steps([m.loss.hex() for m in told], [m.grad_norm.hex() for m in told])


def canonical(folder: Path, *, own: bool = False) -> dict[str, str]:
    """sha256 of every whole tensor of a checkpoint, and of the numbers besides; the same for equal states, whatever
    mesh wrote them. own: also what belongs to a rank."""
    manifest = read_manifest(folder)
    out = {
        name: sha256(read_tensor(folder, manifest, name).contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name in manifest.tensors
        if own or not name.startswith(OWN)
    }
    return {**out, "numbers": str(manifest.state)}


def variants() -> Mapping[str, parity.Case]:
    """Meshes of one to four ranks that the model fits."""
    base = parity.Case(MODEL, microbatches=2, dtype="float32", bucket_bytes=2048)
    return {
        "one": replace(base, placement="zero0"),
        "dp2": replace(base, dp=2),
        "tp2": replace(base, tp=2, sequence=True),
        "pp2": replace(base, pp=2),
        "dp2_pp2": replace(base, dp=2, pp=2, placement="zero3"),
        "dp2_tp2": replace(base, dp=2, tp=2, placement="zero2"),
        "tp4": replace(base, tp=2),
        "dp3": replace(base, dp=3, placement="zero3"),
        "dp4": replace(base, dp=4, placement="zero0"),
    }
