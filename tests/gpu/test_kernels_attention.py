"""Attention on one GPU: what the interpreter runs, with tuned tiles, bf16, long sequences and 64-bit offsets."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import attention, common
from kernel_cases.attention import Shape
from triloom_kernels.attention.flash import flash_attention, flash_attention_with_lse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize("number", range(30))
def test_drawn(number: int, dtype: torch.dtype) -> None:
    shape = attention.drawn(30, SEED)[number]
    print(f"seed {SEED}: {shape}")
    attention.check(shape, dtype, "cuda", None, SEED % 1000 + number)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 8, 2, 1000, 1000, d, causal=causal, window=window, packed=packed)
        for d in (64, 96, 128, 256)
        for causal, window, packed in (
            (True, None, False),
            (False, None, False),
            (True, 200, False),
            (True, None, True),
        )
    ]
    + [Shape(1, 2, 2, 300, 700, 128), Shape(1, 2, 2, 700, 300, 128), Shape(1, 2, 1, 300, 700, 64, False, 100)],
    ids=str,
)
def test_sizes(shape: Shape, dtype: torch.dtype) -> None:
    attention.check(shape, dtype, "cuda", None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_long_against_torch(dtype: torch.dtype) -> None:
    """As far from fp32 as torch's own kernel, up to a factor."""
    q, k, v = (common.draw(1, 2, 8192, 128, seed=i, dtype=dtype, device="cuda") for i in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = flash_attention(q, k, v)
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-3


def test_offsets_beyond_32_bits() -> None:
    """Rows so far apart that the last lie beyond 2^31 elements; 10 GB."""
    rows, apart = 4200, 2**19
    storage = torch.empty(rows * apart, dtype=torch.bfloat16, device="cuda")
    parts = [storage[at:].as_strided((1, 1, rows, 64), (0, 0, apart, 1)) for at in (0, 64, 128)]
    for i, part in enumerate(parts):
        part.copy_(common.draw(1, 1, rows, 64, seed=i, dtype=torch.bfloat16, device="cuda"))
    out, lse = flash_attention_with_lse(*parts)
    expected, logs = flash_attention_with_lse(*(p.contiguous() for p in parts))
    assert torch.equal(out, expected)
    assert torch.equal(lse, logs)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
def test_same_bits(dtype: torch.dtype) -> None:
    attention.check_same_bits("cuda", None, dtype)


def test_the_rest_of_the_interpreter_tests() -> None:
    attention.check_layout("cuda", None)
    attention.check_extremes("cuda", None)
    attention.check_finite_differences("cuda", None)
