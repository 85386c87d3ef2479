"""Cross-entropy in the interpreter, and its eager parts and the fused loss held to the same."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernel_cases import common, losses
from kernel_cases.losses import Shape
from triloom_kernels.cross_entropy import EAGER_PARTS, Terms, UsedUpError, cross_entropy
from triloom_kernels.fused_loss import linear_cross_entropy
from triloom_kernels.softmax_loss import KERNEL_PARTS

PARTS = pytest.mark.parametrize("parts", [EAGER_PARTS, KERNEL_PARTS], ids=["eager", "kernels"])
F64 = torch.float64


@pytest.mark.parametrize(
    ("dtype", "parts"),
    # The interpreter truncates on the way to bf16.
    [*itertools.product(common.INTERPRETED, (EAGER_PARTS, KERNEL_PARTS)), (torch.bfloat16, EAGER_PARTS)],
    ids=lambda value: str(value) if isinstance(value, torch.dtype) else "kernels" if value is KERNEL_PARTS else "eager",
)
@pytest.mark.parametrize("shape", losses.drawn(10, seed=3), ids=str)
def test_drawn(shape: Shape, dtype: torch.dtype, parts: losses.Parts) -> None:
    losses.check_whole(shape, dtype, "cpu", parts)


def test_rows_longer_than_a_block() -> None:
    losses.check_whole(Shape(2, 20001, 0.1, 1e-3), torch.float32, "cpu")


@pytest.mark.parametrize("cuts", [(0, 5, 17), (0, 9, 9, 17), (0, 1, 2, 17), (0, 17, 17)])
def test_shards(cuts: tuple[int, ...]) -> None:
    losses.check_shards(Shape(7, 17, z_loss=1e-2), torch.float32, "cpu", cuts)


@PARTS
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_fused(chunk: int, parts: losses.Parts) -> None:
    losses.check_fused(Shape(9, 33, 0.1, 1e-2), torch.float32, "cpu", chunk, parts)
    losses.check_fused(Shape(5, 3), torch.float16, "cpu", chunk, parts)


@PARTS
def test_fused_shards(parts: losses.Parts) -> None:
    losses.check_fused_shards("cpu", parts)


def test_extremes() -> None:
    losses.check_extremes("cpu")


@PARTS
def test_finite_differences(parts: losses.Parts) -> None:
    t, terms = torch.tensor([2, -100, 0]), Terms(0.1, 1e-2)
    x = common.draw(3, 5, seed=1, dtype=F64).requires_grad_()
    kept = x.detach().clone()
    for function in (
        lambda x: cross_entropy(x.clone(), t, terms=terms, parts=parts, in_place=True),
        lambda x: cross_entropy(x, t, terms=terms, parts=parts),
    ):
        # A loss serves one backward: gradcheck, which asks for several, gets a new one each.
        (grad,) = torch.autograd.grad(function(x), x)
        for i in range(15):
            step = torch.zeros(15, dtype=F64).index_fill_(0, torch.tensor(i), 1e-6).view(3, 5)
            slope = (function(kept + step) - function(kept - step)) / 2e-6
            assert abs(slope - grad.view(-1)[i]) < 1e-8
    w = common.draw(5, 4, seed=2, dtype=F64).requires_grad_()
    h = common.draw(3, 4, seed=3, dtype=F64).requires_grad_()
    grads = torch.autograd.grad(linear_cross_entropy(h, w, t, terms=terms, parts=parts, chunk=2), (h, w))
    for leaf, grad in zip((h, w), grads, strict=True):
        along = common.draw(*leaf.shape, seed=4, dtype=F64)
        ends = []
        for sign in (1, -1):
            moved = [v.detach() + sign * 1e-6 * along if v is leaf else v.detach() for v in (h, w)]
            ends.append(linear_cross_entropy(*moved, t, terms=terms, parts=parts, chunk=2))
        assert abs((ends[0] - ends[1]) / 2e-6 - (grad * along).sum()) < 1e-6  # factors are fp32 in the kernels


@PARTS
def test_same_bits_and_chunks_of_any_size(parts: losses.Parts) -> None:
    shape = Shape(12, 30)
    t = losses.targets(shape, "cpu")
    x, w = (common.draw(n, 8, seed=n, dtype=torch.float32).requires_grad_() for n in (12, 30))

    def run(chunk: int) -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(x, w, t, parts=parts, chunk=chunk)
        return loss, *torch.autograd.grad(loss, (x, w))

    for a, b in zip(run(5), run(5), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(run(5), run(12))


def test_refusals() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    loss = cross_entropy(x, torch.tensor([1, 2, 3]), parts=KERNEL_PARTS)
    loss.backward(retain_graph=True)
    with pytest.raises(UsedUpError, match="run the forward again"):
        loss.backward()
    with pytest.raises(ValueError, match=r"\[0, 1\), got 1.0"):
        Terms(smoothing=1.0)
    with pytest.raises(ValueError, match="z_loss must be at least 0 and finite, got -1"):
        Terms(z_loss=-1)
    with pytest.raises(ValueError, match="a chunk of 0 tokens"):
        linear_cross_entropy(x, x, torch.tensor([0, 1, 2]), chunk=0)
