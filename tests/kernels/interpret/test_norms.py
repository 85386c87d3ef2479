"""The normalisations in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import common, norms
from triloom_kernels import normalising, tuning


@pytest.mark.parametrize("dtype", common.INTERPRETED, ids=str)
@pytest.mark.parametrize(("name", "shape", "biased"), norms.drawn(15, seed=1))
def test_drawn(name: str, shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> None:
    norms.check(name, shape, dtype, "cpu", biased=biased)


@pytest.mark.parametrize("name", norms.NORMS)
def test_wide_rows_by_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for rows beyond the registers, on rows that are not."""
    chunks = {"norm_forward": {"ROWS": 2, "WIDTH": 32}, "norm_backward": {"ROWS": 2, "WIDTH": 32, "PROGRAMS": 2}}

    def options(op: str, arch: int, **shape: int) -> dict[str, int]:
        return dict(chunks[op]) if op in chunks else tuning.options(op, arch, **shape)

    monkeypatch.setattr(normalising, "tuning", type("Narrow", (), {"options": staticmethod(options)}))
    norms.check(name, (7, 100), torch.float32, "cpu", biased=norms.NORMS[name].centred)
    norms.check(name, (1, 64), torch.float16, "cpu", biased=False)


@pytest.mark.parametrize("name", norms.NORMS)
def test_strides(name: str) -> None:
    norms.check_strides(name, "cpu")


@pytest.mark.parametrize("name", norms.NORMS)
def test_extremes(name: str) -> None:
    norms.check_extremes(name, "cpu")


@pytest.mark.parametrize("name", norms.NORMS)
def test_same_bits(name: str) -> None:
    norms.check_same_bits(name, "cpu")


@pytest.mark.parametrize("name", norms.NORMS)
def test_finite_differences(name: str) -> None:
    norm = norms.NORMS[name]
    tensors = norms.inputs(norm, (3, 5), torch.float64, "cpu", norm.centred, 6)
    common.finite_differences(norms.function(norm, norm.centred), *tensors)


@pytest.mark.parametrize("name", norms.NORMS)
def test_no_rows(name: str) -> None:
    norms.check(name, (0, 8), torch.float32, "cpu", biased=False)


def test_frozen_weight_and_only_the_sum_used() -> None:
    x, r, w = (torch.randn(3, 8, requires_grad=k < 2) if k < 2 else torch.ones(8) for k in range(3))
    total, y = normalising.rms_norm_residual(x, r, w, 1e-5)
    torch.testing.assert_close(torch.autograd.grad(total.sum(), (x, r), retain_graph=True), (torch.ones(3, 8),) * 2)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


def test_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 8\), x \(3, 8\)"):
        normalising.rms_norm_residual(torch.ones(3, 8), torch.ones(1, 8), torch.ones(8), 1e-5)
