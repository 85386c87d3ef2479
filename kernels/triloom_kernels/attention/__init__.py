"""Scaled dot-product attention: causal or full, grouped queries, packed sequences, sliding windows.

In torch operations here; by kernels in :mod:`triloom_kernels.attention.flash`, which needs Triton.
"""

from .problem import Packed
from .reference import attention, attention_with_lse

__all__ = ["Packed", "attention", "attention_with_lse"]
