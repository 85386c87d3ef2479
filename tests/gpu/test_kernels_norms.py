"""The normalisations on a GPU: fresh random inputs each run, poisoned outputs."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import common, norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("dtype", [*common.ON_GPU, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(24))
def test_drawn(number: int, dtype: torch.dtype) -> None:
    name, shape, biased = norms.drawn(24, SEED, wide=True)[number]
    print(f"seed {SEED}: {name} {shape} biased={biased}")
    norms.check(name, shape, dtype, "cuda", biased=biased, seed=SEED % 1000)


@pytest.mark.parametrize("name", norms.NORMS)
def test_strides_extremes_and_bits(name: str) -> None:
    norms.check_strides(name, "cuda")
    norms.check_extremes(name, "cuda")
    norms.check_same_bits(name, "cuda")


@pytest.mark.parametrize("name", norms.NORMS)
def test_many_rows(name: str) -> None:
    """More rows than programs of the backward."""
    norms.check(name, (5003, 768), torch.bfloat16, "cuda", biased=norms.NORMS[name].centred, seed=SEED % 1000)


def test_offsets_beyond_32_bits() -> None:
    """The last row of more than 2^31 elements is as if it were alone."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free memory")
    x = torch.empty((1 << 31) // 8192 + 2, 8192, dtype=torch.bfloat16, device="cuda").normal_()
    w = torch.ones(8192, dtype=torch.bfloat16, device="cuda")
    norm = norms.NORMS["rms_norm"].function
    assert torch.equal(norm(x, w, 1e-5)[-1], norm(x[-1:].clone(), w, 1e-5)[0])
