"""Checkpoints of a state on a GPU: by a pinned buffer, in the background, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import triloom
from triloom.checkpoint import path_of, verify
from triloom.parallel.build import mean_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make_engine() -> triloom.Engine:
    torch.manual_seed(3)
    units = [torch.nn.Linear(64, 64), torch.nn.Dropout(0.2), torch.nn.Linear(64, 8)]
    return triloom.Engine(
        units, mean_loss(F.mse_loss), optimizer=triloom.AdamW(lr=1e-2), device=torch.device("cuda"), microbatches=2
    )


def steps(engine: triloom.Engine, checkpoints: triloom.Checkpoints, count: int) -> list[str]:
    told = []
    for _ in range(count):
        gen = torch.Generator().manual_seed(engine.steps)
        metrics = engine.step(torch.randn(16, 64, generator=gen), torch.randn(16, 8, generator=gen))
        checkpoints.after(metrics)
        told.append(metrics.loss.hex())
    return told


def test_a_state_on_the_gpu_goes_on_exactly(tmp_path: Path) -> None:
    """Moments, parameters and torch's generator of the device; a step changes the state while it is written."""
    engine = make_engine()
    with triloom.Checkpoints(engine, tmp_path, every=4) as checkpoints:
        assert checkpoints.resume() is None
        told = steps(engine, checkpoints, 7)
    verify(path_of(tmp_path, 4))
    again = make_engine()
    with triloom.Checkpoints(again, tmp_path) as checkpoints:
        restored = checkpoints.resume()
        assert restored is not None and restored.step == 4
        assert steps(again, checkpoints, 3) == told[4:]


def test_the_buffer_is_pinned(tmp_path: Path) -> None:
    engine = make_engine()
    with triloom.Checkpoints(engine, tmp_path, every=1) as checkpoints:
        checkpoints.save()
        checkpoints.finish()
        assert checkpoints._staging.tensor.is_pinned()
