"""Rotary embedding fused with the split, on a GPU: fresh random inputs each run, poisoned outputs."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import common, ropes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("dtype", [*common.ON_GPU, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(12))
def test_drawn(number: int, dtype: torch.dtype, computed: bool) -> None:
    shape = ropes.drawn(12, SEED)[number]
    if computed and dtype == torch.float64:
        shape = shape._replace(first=0)  # the angle itself is only as exact as its size allows
    print(f"seed {SEED}: {shape}")
    ropes.check(shape, dtype, "cuda", computed=computed, seed=SEED % 1000)


@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_heads_of_models(width: int) -> None:
    shape = ropes.Shape(2, 65, 12, 4, width, width, False, 1)
    ropes.check(shape, torch.bfloat16, "cuda", computed=False, seed=SEED % 1000)


def test_strides() -> None:
    ropes.check_strides("cuda")
