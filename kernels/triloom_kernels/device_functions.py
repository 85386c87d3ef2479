"""What kernels of several operations share inside."""

from __future__ import annotations

from .launching import tl, triton


@triton.jit
def widen(x):
    """To the computing type: fp32, or fp64 for fp64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)
