"""Gated activations and GELU in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import activations, common
from triloom_kernels.gated import swiglu


@pytest.mark.parametrize("dtype", common.INTERPRETED, ids=str)
@pytest.mark.parametrize(("name", "shape"), activations.drawn(21, seed=1))
def test_drawn(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    activations.check(name, shape, dtype, "cpu")


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_strides(name: str) -> None:
    activations.check_strides(name, "cpu")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_extremes(name: str) -> None:
    activations.check_extremes(name, "cpu")


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_no_rows(name: str) -> None:
    activations.check(name, (0, 8), torch.float32, "cpu")


@pytest.mark.parametrize("name", activations.ACTIVATIONS)
def test_finite_differences(name: str) -> None:
    common.finite_differences(
        activations.ACTIVATIONS[name].function, *activations.inputs(name, (3, 4), torch.float64, "cpu", 6)
    )


def test_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even last dimension, got shape \(2, 5\)"):
        swiglu(torch.ones(2, 5))
