"""Activation curves inside kernels, each with its slope, by name.

With s = sigmoid(u):   silu: u = x,   gelu_tanh: u = 2 sqrt(2/pi) (x + 0.044715 x^3), since (1 + tanh(u / 2)) / 2 = s

    value = x s        slope = s + x s (1 - s) du/dx

gelu_erf: value = x P, slope = P + x p with the normal distribution's P(x) = (1 + erf(x / sqrt 2)) / 2 and density p.
Sources: Elfwing et al., arXiv 1702.03118; Hendrycks and Gimpel, arXiv 1606.08415.
"""

from __future__ import annotations

from .launching import tl, triton


@triton.jit
def curve(x, KIND: tl.constexpr):
    """Value at x (computing type)."""
    if KIND == "gelu_erf":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    u = x if KIND == "silu" else x * (1.5957691216057308 + 0.07135481282553477 * x * x)
    return x / (1.0 + tl.exp(-u))


@triton.jit
def curve_and_slope(x, KIND: tl.constexpr):
    """Value and derivative at x (computing type)."""
    if KIND == "gelu_erf":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    u = x if KIND == "silu" else x * (1.5957691216057308 + 0.07135481282553477 * x * x)
    du = 1.0 if KIND == "silu" else 1.5957691216057308 + 3.0 * 0.07135481282553477 * x * x
    s = 1.0 / (1.0 + tl.exp(-u))
    return x * s, s + x * s * (1.0 - s) * du
