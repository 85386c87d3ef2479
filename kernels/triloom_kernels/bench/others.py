"""Kernels of other projects, where they are installed; a missing one is left out and named in the report."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

Function = Callable[..., Any]


def _flash(q: Any, k: Any, v: Any) -> Any:
    attend = importlib.import_module("flash_attn").flash_attn_func
    return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


def _liger(place: str) -> Function:
    """``module:function`` below liger_kernel.ops; its autograd Functions are called by apply."""
    module, name = place.split(":")
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply  # type: ignore[no-any-return]


def _liger_rms_norm() -> Function:
    apply = _liger("rms_norm:LigerRMSNormFunction")
    return lambda x, w, eps: apply(x, w, eps)


def _liger_layer_norm() -> Function:
    apply = _liger("layer_norm:LigerLayerNormFunction")
    return lambda x, w, b, eps: apply(x, w, b, eps)


def _liger_swiglu() -> Function:
    apply = _liger("swiglu:LigerSiLUMulFunction")
    return lambda gate_up: apply(*gate_up.chunk(2, dim=-1))


def _liger_geglu() -> Function:
    apply = _liger("geglu:LigerGELUMulFunction")
    return lambda gate_up: apply(*gate_up.chunk(2, dim=-1))


def _liger_cross_entropy() -> Function:
    apply = _liger("cross_entropy:LigerCrossEntropyFunction")

    def loss(logits: Any, targets: Any) -> Any:
        made = apply(logits, targets, None, -100, 0.0, 0.0, "sum")
        return made[0] if isinstance(made, tuple) else made

    return loss


def _liger_linear_cross_entropy() -> Function:
    apply = _liger("fused_linear_cross_entropy:LigerFusedLinearCrossEntropyFunction")

    def loss(x: Any, weight: Any, targets: Any) -> Any:
        made = apply(x, weight, targets)
        return made[0] if isinstance(made, tuple) else made

    return loss


def _apex_layer_norm() -> Function:
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    return lambda x, w, b, eps: module.fused_layer_norm_affine(x, w, b, (x.shape[-1],), eps)


OTHERS: Mapping[str, Mapping[str, Callable[[], Function]]] = {
    "rms_norm": {"liger": _liger_rms_norm},
    "layer_norm": {"liger": _liger_layer_norm, "apex": _apex_layer_norm},
    "swiglu": {"liger": _liger_swiglu},
    "geglu": {"liger": _liger_geglu},
    "cross_entropy": {"liger": _liger_cross_entropy},
    "linear_cross_entropy": {"liger": _liger_linear_cross_entropy},
    "attention": {"flash-attn": lambda: _flash},
}
"""Operation -> name -> what gives its function, called as the plain one."""


def installed(op: str) -> tuple[dict[str, Function], list[str]]:
    """The functions that can be had, and a line for each that cannot."""
    found, missing = {}, []
    for name, get in OTHERS.get(op, {}).items():
        try:
            if name == "flash-attn":
                importlib.import_module("flash_attn")
            found[name] = get()
        except (ImportError, AttributeError) as error:
            missing.append(f"{op}: {name} is left out: {error}")
    return found, missing
