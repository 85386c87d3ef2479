"""Tensors that have a shape and no values, with which memory is estimated (torch's fake tensors)."""

from __future__ import annotations

import torch


def shadow(t: torch.Tensor) -> bool:
    """Whether ``t`` says it is on its device but has no memory there, so that it can be neither read nor filled."""
    return t.untyped_storage().device.type == "meta" and t.device.type != "meta"
