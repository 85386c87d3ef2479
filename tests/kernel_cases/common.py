"""How a kernel is held to its reference: the same inputs in fp64, values and gradients, outputs poisoned before.

The bodies in this folder run in the interpreter (tests/kernels/interpret) and on a GPU (tests/gpu).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of an element plus the largest one of its tensor: a few roundings in the computing type, one in the tensor's."""

INTERPRETED = (torch.float32, torch.float16)
ON_GPU = (torch.float32, torch.float16, torch.bfloat16)


def computing(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute a dtype in."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch.empty gives is full of NaN (of the largest number in integers)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu", scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for every device, rounded to dtype."""
    wide = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (wide * scale).to(dtype).to(device)


def near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """``|actual - expected| <= tolerance * (|expected| + max |expected|)``, or AssertionError; nan equals nan."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    finite = e.isfinite()
    torch.testing.assert_close(a[~finite], e[~finite], equal_nan=True, msg=lambda m: f"{what}: {m}")
    largest = e[finite].abs().max().item() if finite.any() else 0.0
    bound = tolerance * (e[finite].abs() + largest) + 1e-30
    wrong = (a[finite] - e[finite]).abs()
    assert (wrong <= bound).all(), f"{what}: off by {(wrong / bound).max().item():.3g} times what is allowed"


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    tolerance: float | None = None,
    seed: int = 99,
    grads: Callable[[Tensor], Tensor] = lambda g: g,
) -> None:
    """``function(*inputs)`` with poisoned outputs against ``reference`` of the same in fp64, results and gradients.

    Floating-point inputs are differentiated. grads: what is made of each random gradient (strides).
    """
    own, exact = [], []
    for value in inputs:
        differentiated = isinstance(value, Tensor) and value.is_floating_point()
        own.append(value.detach().requires_grad_() if differentiated else value)
        exact.append(value.detach().double().requires_grad_() if differentiated else value)
    leaves = [v for v in own if isinstance(v, Tensor) and v.requires_grad]
    leaves64 = [v for v in exact if isinstance(v, Tensor) and v.requires_grad]
    with poisoned():
        made = _tuple(function(*own))
    wanted = _tuple(reference(*exact))
    given = [
        grads(draw(*t.shape, seed=seed + i, dtype=t.dtype, device=str(t.device))) if t.numel() else torch.zeros_like(t)
        for i, t in enumerate(made)
    ]
    with poisoned():
        found = torch.autograd.grad(made, leaves, given)
    expected = torch.autograd.grad(wanted, leaves64, [g.double() for g in given])
    for i, (a, e) in enumerate(zip(made, wanted, strict=True)):
        near(a, e, tolerance or TOLERANCE[a.dtype], f"output {i}")
    for i, (a, e, leaf) in enumerate(zip(found, expected, leaves, strict=True)):
        assert a.dtype == leaf.dtype
        near(a, e, tolerance or TOLERANCE[a.dtype], f"gradient {i}")


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def finite_differences(function: Callable[..., Any], *inputs: Any) -> None:
    """fp64 inputs through the kernels: gradients against central differences."""
    leaves = [v.requires_grad_() if isinstance(v, Tensor) and v.dtype == torch.float64 else v for v in inputs]
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-4)


class CubinCase(NamedTuple):
    """Calls an operation forward and backward with meta tensors; what it launches is recorded and compiled."""

    run: Callable[..., None]
    """Sizes by name, as the tuning tables call them; all have defaults."""
    tables: tuple[str, ...]
    """Tuning tables that the case reads; `make kernels-full` runs it at the bounds of each of their entries."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An input that asks for a gradient."""
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def backward(*outputs: Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
