"""Rotary embedding fused with the split, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import common, ropes
from kernel_cases.ropes import Shape
from triloom_kernels import rope, turning


@pytest.mark.parametrize("dtype", common.INTERPRETED, ids=str)
@pytest.mark.parametrize(("seed", "shape"), enumerate(ropes.drawn(14, seed=1)), ids=str)
def test_drawn(shape: Shape, dtype: torch.dtype, seed: int) -> None:
    ropes.check(shape, dtype, "cpu", computed=seed % 2 == 0)


@pytest.mark.parametrize("shape", ropes.drawn(12, seed=2)[::3], ids=str)
def test_eager_is_the_same(shape: Shape) -> None:
    qkv = torch.randn(shape.whole, requires_grad=True)
    tables = ropes.tables(shape, torch.float32, "cpu")
    how = shape.heads, shape.kv_heads, shape.interleaved
    own, eager = turning.split_rotate(qkv, *tables, *how), rope.split_rotate(qkv, *tables, *how)
    computed = rope.split_rotate_computed(qkv, ropes.THETA, shape.turned, *how, along=shape.along, first=shape.first)
    for a, b, c in zip(own, eager, computed, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(b, c)
    grads = [torch.randn_like(t) for t in own]
    torch.testing.assert_close(torch.autograd.grad(own, qkv, grads), torch.autograd.grad(eager, qkv, grads))


def test_strides() -> None:
    ropes.check_strides("cpu")


@pytest.mark.parametrize("interleaved", [False, True])
def test_finite_differences(interleaved: bool) -> None:
    qkv = common.draw(1, 1, 8, seed=3, dtype=torch.float64)
    common.finite_differences(lambda x: turning.split_rotate_computed(x, 50.0, 2, 2, 1, interleaved, first=3), qkv)


@pytest.mark.parametrize(("shape", "turned"), [((1, 2, 21), 2), ((1, 2, 20), 3), ((1, 2, 20), 6), ((2, 20), 2)])
def test_refused(shape: tuple[int, ...], turned: int) -> None:
    with pytest.raises(ValueError, match=r"must be \[a, b, 5 heads \* d\] with an even number of turned channels"):
        turning.split_rotate_computed(torch.ones(shape), 50.0, turned, 3, 1)
