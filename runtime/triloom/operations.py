"""The table of operations that the runtime hands to layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from triloom_kernels import table
from triloom_kernels.table import Kernels as Kernels

from . import philox


def operations() -> Kernels:
    """Triton kernels on CUDA, torch operations on the CPU, where dropout draws in the extension.

    ``operations().using("rms_norm", mine, "cpu")`` swaps one; it takes and gives what the one in its place does.
    """
    return (
        table.default()
        .using("dropout", philox.dropout, "cpu")
        .using("bias_dropout_residual", bias_dropout_residual, "cpu")
    )


def bias_dropout_residual(
    x: Tensor, bias: Tensor | None, residual: Tensor, p: float, key: int, base: int, strides: Sequence[int]
) -> Tensor:
    """``residual + dropout(x + bias)``; residual: of x's shape; bias: of its last dimension, or None."""
    return residual + philox.dropout(x if bias is None else x + bias, p, key, base, strides)
