"""Gated activations and GELU on a GPU: fresh random inputs each run, poisoned outputs."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import activations, common

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("dtype", [*common.ON_GPU, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(28))
def test_drawn(number: int, dtype: torch.dtype) -> None:
    name, shape = activations.drawn(28, SEED)[number]
    print(f"seed {SEED}: {name} {shape}")
    activations.check(name, shape, dtype, "cuda", seed=SEED % 1000)


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_strides_and_extremes(name: str) -> None:
    activations.check_strides(name, "cuda")
    activations.check_extremes(name, "cuda")


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_many_rows(name: str) -> None:
    activations.check(name, (5003, 1376), torch.bfloat16, "cuda", seed=SEED % 1000)


def test_offsets_beyond_32_bits() -> None:
    """The last row of more than 2^31 elements is as if it were alone."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free memory")
    x = torch.empty((1 << 31) // 16384 + 2, 16384, dtype=torch.bfloat16, device="cuda").normal_()
    swiglu = activations.ACTIVATIONS["swiglu"].function
    assert torch.equal(swiglu(x)[-1], swiglu(x[-1:].clone())[0])
