"""Dropout in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_cases import common, dropouts
from triloom_kernels import counted_dropout, dropout

DRAWN = dropouts.drawn(15, seed=1)


@pytest.mark.parametrize("dtype", common.INTERPRETED, ids=str)
@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_bits_are_those_of_the_runtime(case: Any, dtype: torch.dtype) -> None:
    dropouts.check_bits(*case, dtype, "cpu")


@pytest.mark.parametrize("dtype", [*common.INTERPRETED, torch.float64], ids=str)
@pytest.mark.parametrize("case", DRAWN[:5], ids=str)
def test_fused(case: Any, dtype: torch.dtype) -> None:
    dropouts.check_fused(*case, dtype, "cpu")


def test_cuts() -> None:
    dropouts.check_cuts("cpu")


def test_share_that_falls() -> None:
    dropouts.check_share("cpu")


def test_eager_has_the_same_bits() -> None:
    shape, strides, base, key, p = DRAWN[2]
    x, bias, residual = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    how = p, key, base, strides
    assert torch.equal(counted_dropout.dropout(x, *how), dropout.dropout(x, *how))
    own, eager = (m.bias_dropout_residual(x, bias, residual, *how) for m in (counted_dropout, dropout))
    assert torch.equal(own, eager)


def test_nothing_falls_at_zero() -> None:
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    assert counted_dropout.dropout(x, 0.0, 1, 0, (8, 1)) is x
    assert torch.equal(counted_dropout.bias_dropout_residual(x, None, residual, 0.0, 1, 0, (8, 1)), residual + x)


def test_strides_of_memory() -> None:
    x = torch.randn(6, 8, 12)[:, ::2, 1:9].transpose(0, 1)
    how = 0.5, 7, 0, (48, 8, 1)
    assert torch.equal(counted_dropout.dropout(x, *how), dropouts.expected(x, *how))


@pytest.mark.parametrize(
    ("p", "key", "strides", "message"),
    [
        (1.0, 0, (8, 1), r"must be in \[0, 1\), got 1.0"),
        (0.5, 1 << 64, (8, 1), "64-bit"),
        (0.5, 0, (1,), "one entry per dimension"),
    ],
)
def test_refused(p: float, key: int, strides: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counted_dropout.dropout(torch.ones(3, 8), p, key, 0, strides)


def test_dimensions_that_do_not_fold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"over two dimensions, but leading dimensions \(2, 2, 2\).* are 3; use"):
        counted_dropout.dropout(torch.ones(2, 2, 2, 4), 0.5, 0, 0, (100, 30, 8, 1))
