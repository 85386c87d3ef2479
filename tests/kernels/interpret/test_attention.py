"""Attention in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernel_cases import attention, common
from kernel_cases.attention import Shape, tiles
from triloom_kernels.attention import Packed, attention_with_lse
from triloom_kernels.attention.flash import flash_attention

SMALL = tiles(16, 16, 16)
EVERY = Packed.of(torch.tensor([0, 5], dtype=torch.int32), 5)


@pytest.mark.parametrize(("seed", "shape"), list(enumerate(attention.drawn(15, seed=2))), ids=str)
def test_drawn(shape: Shape, seed: int) -> None:
    walk = ((32, 32, 16), (32, 16, 16), (16, 32, 16), (32, 64, 32))[seed % 4]
    attention.check(shape, common.INTERPRETED[seed % 2], "cpu", tiles(*walk), seed)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(1, 1, 1, 130, 130, 16),
        Shape(1, 1, 1, 40, 20, 16),  # the first 20 queries see nothing
        Shape(1, 1, 1, 70, 90, 16, causal=False, window=10),
        Shape(1, 1, 1, 20, 90, 16, window=10),
        Shape(3, 2, 1, 33, 20, 16, packed=True),
        Shape(1, 1, 1, 5, 5, 96),
        Shape(1, 1, 1, 5, 5, 256),
        Shape(1, 1, 1, 0, 5, 16),
        Shape(1, 1, 1, 5, 0, 16),
    ],
    ids=str,
)
def test_named(shape: Shape) -> None:
    attention.check(shape, torch.float32, "cpu", tiles(32, 32, 16))


def test_tuned_tiles() -> None:
    attention.check(Shape(1, 1, 1, 130, 130, 64), torch.float16, "cpu", None)


def test_layout() -> None:
    attention.check_layout("cpu", SMALL)


def test_extremes() -> None:
    attention.check_extremes("cpu", SMALL)


def test_same_bits() -> None:
    attention.check_same_bits("cpu", SMALL)


def test_finite_differences() -> None:
    attention.check_finite_differences("cpu", SMALL)


def test_fp64_is_the_formula() -> None:
    q, k, v = attention.inputs(Shape(1, 2, 1, 5, 7, 8), torch.float64, "cpu", None)
    assert torch.equal(flash_attention(q, k, v, window=3), attention_with_lse(q, k, v, window=3)[0])


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda q, k, v: (q, k, v[:, :, 1:]), {}, ValueError, r"got \(1, 4, 5, 8\), \(1, 2, 5, 8\) and \(1, 2, 4, 8\)"),
        (lambda q, k, v: (q[:, :3], k, v), {}, ValueError, "3 query heads cannot share 2 key heads"),
        (lambda q, k, v: (q, k.half(), v), {}, TypeError, "got torch.float32, torch.float16, torch.float32"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), {}, TypeError, "one of bfloat16, float16 and float32"),
        (lambda *t: tuple(x.repeat(1, 1, 1, 40) for x in t), {}, ValueError, r"320 is outside 1\.\.256"),
        (lambda *t: t, {"window": 0}, ValueError, "a window of 0 keys"),
        (lambda *t: t, {"scale": -1.0}, ValueError, "positive and finite, got -1.0"),
        (lambda *t: tuple(x.repeat(2, 1, 1, 1) for x in t), {"packed": EVERY}, ValueError, "got a batch of 2"),
    ],
)
def test_refusals(change: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = attention.inputs(Shape(1, 4, 2, 5, 5, 8), torch.float32, "cpu", None)
    with pytest.raises(error, match=message):
        flash_attention(*change(*given), **options)


@pytest.mark.parametrize("starts", [[0, 3, 2], [1, 3], [0, 6]])
def test_packed_sequences_that_do_not_fit(starts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must begin at 0 and have 0\.\.5 tokens, got starts"):
        Packed.of(torch.tensor(starts, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match="int32"):
        Packed.of(torch.tensor(starts), 5)
