"""Dropout on a GPU: the bits of the runtime's code on the CPU; fresh random inputs each run, poisoned outputs."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import common, dropouts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("dtype", [*common.ON_GPU, torch.float64], ids=str)
@pytest.mark.parametrize("number", range(15))
def test_drawn(number: int, dtype: torch.dtype) -> None:
    case = dropouts.drawn(15, SEED)[number]
    print(f"seed {SEED}: {case}")
    dropouts.check_bits(*case, dtype, "cuda")
    dropouts.check_fused(*case, dtype, "cuda")


def test_cuts_and_share() -> None:
    dropouts.check_cuts("cuda")
    dropouts.check_share("cuda")


def test_many_rows() -> None:
    """More rows than programs of the backward."""
    dropouts.check_fused((3, 1700, 768), (1700 * 768, 768, 1), 0, dropouts.KEYS[4], 0.1, torch.bfloat16, "cuda")
