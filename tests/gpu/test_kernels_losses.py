"""Cross-entropy on one GPU: what the interpreter runs, bf16 and vocabularies of real models."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import common, losses
from kernel_cases.losses import Shape
from triloom_kernels.cross_entropy import cross_entropy
from triloom_kernels.fused_loss import add_product_
from triloom_kernels.softmax_loss import KERNEL_PARTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize("number", range(30))
def test_drawn(number: int, dtype: torch.dtype) -> None:
    shape = losses.drawn(30, SEED, wide=True)[number]
    print(f"seed {SEED}: {shape}")
    losses.check_whole(shape, dtype, "cuda", seed=SEED % 1000)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize("cuts", [(0, 5, 17), (0, 9, 9, 17), (0, 1, 2, 17)])
def test_shards(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    losses.check_shards(Shape(7, 17, z_loss=1e-2), dtype, "cuda", cuts)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize("chunk", [4, 100])
def test_fused(chunk: int, dtype: torch.dtype) -> None:
    losses.check_fused(Shape(33, 1000, 0.1, 1e-2), dtype, "cuda", chunk)


def test_fused_shards() -> None:
    losses.check_fused_shards("cuda")


def test_extremes() -> None:
    losses.check_extremes("cuda")


def test_products_are_summed_in_fp32() -> None:
    out = torch.full((8, 16), 256.0, device="cuda")
    ones = torch.ones(1, 8, dtype=torch.bfloat16, device="cuda"), torch.ones(1, 16, dtype=torch.bfloat16, device="cuda")
    add_product_(out, *ones)
    assert out.eq(257).all()  # bf16 has no 257


def test_more_than_2_to_31_logits() -> None:
    """10 GB of bf16; only the last row is looked at."""
    rows, vocab = 17000, 128256
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 3.0
    targets = torch.full((rows,), -100, device="cuda")
    targets[-1] = 5
    leaf = logits.requires_grad_()
    loss = cross_entropy(leaf, targets, parts=KERNEL_PARTS, in_place=False)
    expected = torch.nn.functional.cross_entropy(leaf.detach()[-1:].float(), targets[-1:])
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert not grad[:-1].any()
    torch.testing.assert_close(grad[-1, 5].float(), expected.neg().exp() - 1, rtol=1e-2, atol=0)
