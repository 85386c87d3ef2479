"""A decoder trained one step with kernels on (in the interpreter) and off: loss and gradients, also over tp = 2.

Ranks are threads; the interpreter runs one kernel at a time (``launching``), whichever rank launched it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triloom import SGD, Engine, run_threads
from triloom.groups.base import Group
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.operations import operations
from triloom_kernels import table
from triloom_kernels.table import Kernels

SIZES: dict[str, Any] = {"vocab": 19, "hidden": 16, "layers": 1, "heads": 4, "max_seq": 8}
MODELS = {
    "llama": llama(**SIZES, kv_heads=2),
    "fused loss": llama(**SIZES, fused_loss=True),
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


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("which", MODELS)
def test_kernels_on_and_off(which: str, tp: int, sequence_parallel: bool) -> None:
    off = run_threads(tp, lambda g: step(which, operations(), g, sequence_parallel))[0]
    on = run_threads(tp, lambda g: step(which, table.triton_on("cpu"), g, sequence_parallel))
    for loss, grads in on:
        assert loss == pytest.approx(off[0], rel=1e-6)
        assert grads.keys() == off[1].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, off[1][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
