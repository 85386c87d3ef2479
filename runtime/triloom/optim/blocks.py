"""Block-wise 8-bit quantisation of optimizer states: the numbers (:mod:`triloom_kernels.adamw` has the coding).

Dynamic tree numbers after Dettmers et al. (arXiv 2110.02861, section 1.3): the further below 1, the fewer the
steps of a decade. Here a decade ``(10^-(e+1), 10^-e]`` with f bits left is cut into ``2^f`` equal steps, of
which the right ends are taken, so that the largest magnitude of a block, and zero, are exact. Signed: 127
numbers over 7 decades on each side of zero; unsigned: 255 over 8.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Table(NamedTuple):
    """256 numbers from -1 or 0 to 1, rising, and the 255 bounds between them: a value on a bound goes down."""

    numbers: torch.Tensor
    bounds: torch.Tensor

    def to(self, dtype: torch.dtype) -> Table:
        return Table(self.numbers.to(dtype), self.bounds.to(dtype))


def _decades(bits: int) -> torch.Tensor:
    """Positive numbers of ``bits`` bits, rising."""
    parts = []
    for e in reversed(range(bits)):
        steps = 1 << (bits - 1 - e)
        parts.append((0.1 + 0.9 * torch.arange(1, steps + 1, dtype=torch.float64) / steps) * 10.0**-e)
    return torch.cat(parts)


def _middles(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers[1:] + numbers[:-1]) / 2


def _signed() -> Table:
    positive = _decades(7)
    numbers = torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])
    spare = torch.tensor([float("inf")], dtype=torch.float64)  # code 255 is not used
    return Table(torch.cat([numbers, numbers[-1:]]), torch.cat([_middles(numbers), spare]))


def _unsigned() -> Table:
    numbers = torch.cat([torch.zeros(1, dtype=torch.float64), _decades(8)])
    bounds = _middles(numbers)
    bounds[0] = 0.0  # what is not zero does not become zero
    return Table(numbers, bounds)


SIGNED = _signed()
UNSIGNED = _unsigned()
