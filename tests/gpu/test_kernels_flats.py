"""Optimizers, sums and packed forms on a GPU: the interpreter's cases with bf16 and longer tensors, fresh inputs each
run, poisoned outputs."""

from __future__ import annotations

import random

import pytest
import torch

from kernel_cases import common, flats
from triloom_kernels import ordered_sums, packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SEED = random.randrange(1 << 30)
SIZES = (*flats.SIZES, 100_003)
BLOCKS = (*flats.BLOCKS, 5000)
WIDE = (*common.ON_GPU, torch.float64)


@pytest.fixture(autouse=True)
def _seed_is_told() -> None:
    print(f"seed {SEED}")


@pytest.mark.parametrize("grad", common.ON_GPU, ids=str)
@pytest.mark.parametrize("low", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_adamw(n: int, low: torch.dtype | None, grad: torch.dtype) -> None:
    flats.check_adamw(n, grad, low, "cuda", seed=SEED)


@pytest.mark.parametrize("grad", common.ON_GPU, ids=str)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_adamw8(blocks: int, grad: torch.dtype) -> None:
    flats.check_adamw8(blocks, grad, "cuda", seed=SEED)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_square_sums(n: int, dtype: torch.dtype) -> None:
    flats.check_square_sums(n, dtype, "cuda", seed=SEED)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize(("ranks", "n"), [(1, 5), (2, 129), (3, 1000), (8, 64), (8, 100_003)])
def test_rank_sum(ranks: int, n: int, dtype: torch.dtype) -> None:
    flats.check_rank_sum(ranks, n, dtype, "cuda", seed=SEED)


@pytest.mark.parametrize("bucket", common.ON_GPU, ids=str)
@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
def test_pack(dtype: torch.dtype, bucket: torch.dtype) -> None:
    flats.check_pack(dtype, bucket, "cuda", seed=SEED)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize(("block", "blocks"), [(8, 8), (16, 5), (32, 40), (64, 1), (64, 4), (64, 33), (64, 5000)])
def test_quantise(block: int, blocks: int, dtype: torch.dtype) -> None:
    flats.check_quantise(block, blocks, dtype, "cuda", seed=SEED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "n", "count"), [(1, 1, 1), (2, 100, 5), (3, 700, 699), (4, 65, 65), (4, 9001, 900)])
def test_largest(rows: int, n: int, count: int, dtype: torch.dtype) -> None:
    flats.check_largest(rows, n, count, dtype, "cuda", seed=SEED)


@pytest.mark.parametrize("dtype", common.ON_GPU, ids=str)
@pytest.mark.parametrize(("n", "v", "h"), [(1, 1, 1), (17, 33, 65), (70, 129, 20), (300, 520, 260)])
def test_weight_product(n: int, v: int, h: int, dtype: torch.dtype) -> None:
    flats.check_weight_product(n, v, h, dtype, "cuda", seed=SEED)


def test_offsets_beyond_32_bits() -> None:
    """The last elements of more than 2^31 are as if they were alone."""
    n = (1 << 31) + 64 * 3
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-64:] = torch.arange(1, 65, device="cuda")
    sums = ordered_sums.square_sums(x)
    assert sums[-1] == ordered_sums.square_sums(x[-64:].clone())[0]
    assert not sums[:-1].any()
    bucket = packed.pack_(torch.empty(n, dtype=torch.bfloat16, device="cuda"), [x])
    assert torch.equal(bucket[-128:], x[-128:])
    out = ordered_sums.rank_sum_(torch.empty(n // 3, dtype=torch.float32, device="cuda"), x.view(3, n // 3))
    assert torch.equal(out[-64:], x[-64:].float())
