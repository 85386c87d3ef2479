"""Optimizers, sums and packed forms in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import flats
from kernel_cases.common import INTERPRETED
from triloom_kernels import packing


@pytest.mark.parametrize("grad", INTERPRETED, ids=str)
@pytest.mark.parametrize("n", flats.SIZES)
def test_adamw(n: int, grad: torch.dtype) -> None:
    flats.check_adamw(n, grad, torch.float16 if n % 2 else None, "cpu")


@pytest.mark.parametrize("grad", INTERPRETED, ids=str)
@pytest.mark.parametrize("blocks", flats.BLOCKS)
def test_adamw8(blocks: int, grad: torch.dtype) -> None:
    flats.check_adamw8(blocks, grad, "cpu")


@pytest.mark.parametrize("dtype", [*INTERPRETED, torch.float64], ids=str)
@pytest.mark.parametrize("n", flats.SIZES)
def test_square_sums(n: int, dtype: torch.dtype) -> None:
    flats.check_square_sums(n, dtype, "cpu")


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize(("ranks", "n"), [(1, 5), (2, 129), (3, 1000), (8, 64)])
def test_rank_sum(ranks: int, n: int, dtype: torch.dtype) -> None:
    flats.check_rank_sum(ranks, n, dtype, "cpu")


@pytest.mark.parametrize("bucket", INTERPRETED, ids=str)
@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
def test_pack(dtype: torch.dtype, bucket: torch.dtype) -> None:
    flats.check_pack(dtype, bucket, "cpu")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("block", "blocks"), [(8, 8), (16, 5), (32, 40), (64, 1), (64, 4), (64, 33)])
def test_quantise(block: int, blocks: int) -> None:
    for dtype in INTERPRETED:
        flats.check_quantise(block, blocks, dtype, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "n", "count"), [(1, 1, 1), (2, 100, 5), (3, 700, 699), (4, 65, 65)])
def test_largest(rows: int, n: int, count: int, dtype: torch.dtype) -> None:
    flats.check_largest(rows, n, count, dtype, "cpu")


def test_a_bucket_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\) does not hold 5 elements"):
        packing.check(torch.empty(4), [torch.empty(5)])
    with pytest.raises(ValueError, match="one dtype"):
        packing.check(torch.empty(4), [torch.empty(2), torch.empty(2).half()])


@pytest.mark.parametrize("dtype", INTERPRETED, ids=str)
@pytest.mark.parametrize(("n", "v", "h"), [(1, 1, 1), (17, 33, 65), (70, 129, 20)])
def test_weight_product(n: int, v: int, h: int, dtype: torch.dtype) -> None:
    flats.check_weight_product(n, v, h, dtype, "cpu")
