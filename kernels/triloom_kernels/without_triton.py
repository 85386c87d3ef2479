"""Stands in for ``triton`` and ``triton.language`` where Triton is missing: decorating works, launching raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class MissingTritonError(RuntimeError):
    """A Triton kernel was launched without Triton."""


class MissingKernel:
    """What ``triton.jit`` makes of a function here."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        raise MissingTritonError(
            f"{self._name} is a Triton kernel and Triton is not installed; pip install 'triloom[kernels]', or use the "
            "eager operations (triloom_kernels.table.eager())"
        )


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return MissingKernel if function is None else MissingKernel(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


class tl:
    """Only what op files touch outside kernels."""

    class constexpr:
        def __init__(self, value: Any) -> None:
            self.value = value
