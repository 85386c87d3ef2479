"""Sums in a stated order: squares of a flat tensor for the global norm, and the parts that ranks sent.

The kernels are in :mod:`triloom_kernels.ordered_sums`.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


@torch.no_grad()
def square_sums(x: Tensor) -> Tensor:
    """Sums of squares of the blocks of BLOCK elements: fp64 ``[ceil(n / BLOCK)]``.

    x: floating-point, contiguous. A block is summed by a balanced tree (the upper half added onto the lower), a
    short one as if padded with zeros, so that a tensor cut at multiples of BLOCK has the sums of its pieces. A sum of
    fp32 or narrower elements is finite exactly if all of them are: the norm and the check for inf and nan are one pass.
    """
    n = x.numel()
    blocks = -(-n // BLOCK)
    terms = torch.zeros(blocks * BLOCK, dtype=torch.float64, device=x.device)
    wide = x.reshape(-1).double()
    torch.mul(wide, wide, out=terms[:n])
    terms = terms.view(blocks, BLOCK)
    half = BLOCK // 2
    while half:
        terms = terms[:, :half] + terms[:, half : 2 * half]
        half //= 2
    return terms.reshape(blocks)


@torch.no_grad()
def rank_sum_(out: Tensor, parts: Tensor, *, accumulate: bool = False) -> Tensor:
    """``out (+)= parts[0] + parts[1] + ...`` from left to right in fp32 (fp64 for fp64), rounded once to out's dtype.

    parts: ``[ranks, n]``, contiguous, as an all_to_all leaves them; out: ``[n]``, of any floating dtype. accumulate:
    add the sum to what is in out, in fp32, instead of replacing it.
    """
    dtype = torch.float64 if parts.dtype == torch.float64 else torch.float32
    total = parts[0].to(dtype, copy=True)
    for part in parts[1:]:
        total += part.to(dtype)
    return out.copy_(out.to(dtype) + total) if accumulate else out.copy_(total)
