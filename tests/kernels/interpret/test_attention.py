"""Attention in the interpreter."""

from __future__ import annotations

import pytest
import torch

from kernel_cases import attention, common
from kernel_cases.attention import Shape, tiles

SMALL = tiles(16, 16, 16)


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
