"""A decoder trained one step with kernels on (in the interpreter) and off: loss and gradients, also over tp = 2.

Ranks are threads; the interpreter runs one kernel at a time (``launching``), whichever rank launched it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from triloom import SGD, Engine, run_threads, tracing
from triloom.estimate import estimate
from triloom.groups.base import Group
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.operations import operations
from triloom.placement import zero1
from triloom.schedules import NAMED
from triloom.scope import Scope
from triloom_kernels import table
from triloom_kernels.table import Kernels

SIZES: dict[str, Any] = {"vocab": 19, "hidden": 16, "layers": 1, "heads": 4, "max_seq": 8}
MODELS = {
    "llama": llama(**SIZES, kv_heads=2),
    "fused loss": llama(**SIZES, fused_loss=True),
    "geglu": replace(llama(**SIZES), act="geglu"),
    "gpt2": gpt2(**SIZES, dropout=0.25),
    "probabilities": gpt2(**SIZES, attention_dropout=0.25),
}


def step(which: str, kernels: Kernels, world: Group, sequence_parallel: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient: a step of size 1 leaves the difference."""
    model, gen = decoder(MODELS[which]), torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(0, 19, (2, 6), generator=gen) for _ in range(2))
    targets[0, :2] = -100
    engine = Engine(
        model.units, model.loss, ties=model.ties, world=world, mesh=make_mesh(world.size, tp=world.size), clip=None,
        optimizer=SGD(lr=1.0), kernels=kernels, seed=5, sequence_parallel=sequence_parallel,
    )  # fmt: skip
    before = engine.full_state()
    loss = engine.step(ids, targets).loss
    return loss, {name: before[name] - after for name, after in engine.full_state().items()}


CASES = [(which, *how) for which in ("llama", "gpt2") for how in ((1, False), (2, False), (2, True))] + [
    (which, 2, True) for which in ("geglu", "probabilities", "fused loss")
]


@pytest.mark.parametrize(("which", "tp", "sequence_parallel"), CASES)
def test_kernels_on_and_off(which: str, tp: int, sequence_parallel: bool) -> None:
    off = run_threads(tp, lambda g: step(which, operations(), g, sequence_parallel))[0]
    on = run_threads(tp, lambda g: step(which, table.triton_on("cpu"), g, sequence_parallel))
    for loss, grads in on:
        assert loss == pytest.approx(off[0], rel=1e-6)
        assert grads.keys() == off[1].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, off[1][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_memory_is_estimated_with_the_kernels(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without memory nothing is launched, and what autograd would keep is seen."""
    monkeypatch.setattr(tracing, "Scope", partial(Scope, kernels=table.triton_on("cpu")))
    model, mesh = decoder(MODELS[which]), make_mesh(1)
    tokens = (2, 8), torch.int64
    (report,) = estimate(
        tracing.Run(
            units=model.units, loss=model.loss, ties=model.ties, mesh=mesh, order=NAMED["1f1b"](1, 2), inputs=tokens,
            targets=tokens, optimizer=SGD(lr=1.0), placement=zero1(),
        )
    )  # fmt: skip
    assert report.peak["activations"] > 2 * 8 * 16 * 4
