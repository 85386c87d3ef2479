"""Which function computes an operation on which device.

A table is a value: hand it to whoever builds layers. ``default()`` has Triton on CUDA and eager torch on the CPU;
``default().using("rms_norm", mine)`` swaps one operation.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .adamw import adamw8_, adamw_
from .attention import attention
from .cross_entropy import shard_gradient, shard_statistics, whole_loss_and_gradient
from .dropout import bias_dropout_residual, dropout
from .geglu import geglu
from .gelu import bias_gelu, gelu
from .layer_norm import layer_norm, layer_norm_residual
from .packing import add_taken_, dequantise_sum_, pack_, quantise, take_largest, unpack_add_
from .rms_norm import rms_norm, rms_norm_residual
from .rope import split_rotate, split_rotate_computed
from .sums import rank_sum_, square_sums
from .swiglu import swiglu

Function = Callable[..., Any]

EAGER: Mapping[str, Function] = {
    "adamw8_": adamw8_,
    "adamw_": adamw_,
    "add_taken_": add_taken_,
    "attention": attention,
    "bias_dropout_residual": bias_dropout_residual,
    "bias_gelu": bias_gelu,
    "cross_entropy_both": whole_loss_and_gradient,
    "cross_entropy_gradient": shard_gradient,
    "cross_entropy_statistics": shard_statistics,
    "dequantise_sum_": dequantise_sum_,
    "dropout": dropout,
    "geglu": geglu,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "layer_norm_residual": layer_norm_residual,
    "pack_": pack_,
    "quantise": quantise,
    "rank_sum_": rank_sum_,
    "rms_norm": rms_norm,
    "rms_norm_residual": rms_norm_residual,
    "split_rotate": split_rotate,
    "split_rotate_computed": split_rotate_computed,
    "square_sums": square_sums,
    "swiglu": swiglu,
    "take_largest": take_largest,
    "unpack_add_": unpack_add_,
}
"""In torch operations: any device, the references of the others. Their modules do not import Triton."""

TRITON: Mapping[str, str] = {
    "adamw8_": "flat_adamw.adamw8_",
    "adamw_": "flat_adamw.adamw_",
    "add_taken_": "packed.add_taken_",
    "attention": "attention.flash.flash_attention",
    "bias_dropout_residual": "counted_dropout.bias_dropout_residual",
    "bias_gelu": "biased_gelu.bias_gelu",
    "cross_entropy_both": "softmax_loss.whole_loss_and_gradient",
    "cross_entropy_gradient": "softmax_loss.shard_gradient",
    "cross_entropy_statistics": "softmax_loss.shard_statistics",
    "dequantise_sum_": "packed.dequantise_sum_",
    "dropout": "counted_dropout.dropout",
    "geglu": "gated.geglu",
    "gelu": "biased_gelu.gelu",
    "layer_norm": "normalising.layer_norm",
    "layer_norm_residual": "normalising.layer_norm_residual",
    "pack_": "packed.pack_",
    "quantise": "packed.quantise",
    "rank_sum_": "ordered_sums.rank_sum_",
    "rms_norm": "normalising.rms_norm",
    "rms_norm_residual": "normalising.rms_norm_residual",
    "split_rotate": "turning.split_rotate",
    "split_rotate_computed": "turning.split_rotate_computed",
    "square_sums": "ordered_sums.square_sums",
    "swiglu": "gated.swiglu",
    "take_largest": "packed.take_largest",
    "unpack_add_": "packed.unpack_add_",
}
"""Kernels; same arguments and results as the eager function. Module and name: imported, and Triton with them, when
they are first picked."""


@dataclass(frozen=True)
class Kernels:
    """Rows ``(operation, device type) -> function``, or the function's place in this package."""

    rows: Mapping[tuple[str, str], Function | str]

    def pick(self, op: str, device: torch.device | str) -> Function:
        """The function of ``op`` on ``device``; KeyError naming both if there is none."""
        found = self._row(op, torch.device(device).type)
        return _imported(found) if isinstance(found, str) else found

    def using(self, op: str, function: Function, device: str = "cuda") -> Kernels:
        """The same table with one row replaced; KeyError if there is no such row."""
        self._row(op, device)
        return Kernels({**self.rows, (op, device): function})

    def _row(self, op: str, kind: str) -> Function | str:
        try:
            return self.rows[op, kind]
        except KeyError:
            known = ", ".join(sorted({name for name, _ in self.rows}))
            raise KeyError(f"no operation {op!r} for {kind} in the table; it has {known}") from None


@cache
def _imported(place: str) -> Function:
    module, _, name = place.rpartition(".")
    function: Function = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return function


def default() -> Kernels:
    """Triton on CUDA where there is a kernel; eager torch elsewhere, meta included."""
    return Kernels({(op, kind): function for kind in ("cpu", "meta") for op, function in EAGER.items()}
                   | {(op, "cuda"): TRITON.get(op, function) for op, function in EAGER.items()})  # fmt: skip


def eager() -> Kernels:
    """Torch operations everywhere."""
    return Kernels({(op, kind): function for kind in ("cpu", "cuda", "meta") for op, function in EAGER.items()})


def triton_on(kind: str) -> Kernels:
    """Kernels on devices of this type too; the interpreter runs them on the CPU (TRITON_INTERPRET=1)."""
    return Kernels({**default().rows, **{(op, kind): function for op, function in TRITON.items()}})
