"""What attention is asked for: who sees whom, packed sequences, and what of it cannot work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WIDEST = 256
"""Largest head dimension of the kernels."""


@dataclass(frozen=True)
class Packed:
    """Sequences of different lengths behind one another in the sequence dimension of a batch of one."""

    starts_q: Tensor
    """``[sequences + 1]`` int32, on the queries' device: where each begins, and where the last ends."""
    starts_k: Tensor
    """The same of the keys."""
    longest_q: int
    """Most queries of a sequence; more only costs idle programs."""
    longest_k: int

    def __post_init__(self) -> None:
        """On a CPU, raise ValueError for lengths that do not fit; on a GPU, an asynchronous device assertion."""
        for starts, longest in ((self.starts_q, self.longest_q), (self.starts_k, self.longest_k)):
            if starts.dtype != torch.int32 or starts.dim() != 1 or len(starts) < 2:
                raise ValueError(
                    f"starts of sequences must be [sequences + 1] int32, got {tuple(starts.shape)} {starts.dtype}"
                )
            lengths = starts.diff()
            good = (lengths >= 0).all() & (lengths <= longest).all() & (starts[0] == 0)
            if starts.is_cuda:
                torch._assert_async(good, f"packed sequences must begin at 0 and have 0..{longest} tokens")
            elif starts.device.type == "cpu" and not good:
                raise ValueError(
                    f"packed sequences must begin at 0 and have 0..{longest} tokens, got starts {starts.tolist()}"
                )
        if len(self.starts_q) != len(self.starts_k):
            raise ValueError(f"{len(self.starts_q) - 1} sequences of queries and {len(self.starts_k) - 1} of keys")

    @staticmethod
    def of(starts: Tensor, longest: int) -> Packed:
        """Self-attention: queries and keys have the same lengths."""
        return Packed(starts, starts, longest, longest)


@dataclass(frozen=True)
class Problem:
    """Arguments made explicit, as the kernels take them."""

    causal: bool
    window: int
    """0: none."""
    scale: float
    width: int
    """Columns of a tile: tensor cores want powers of two, 16 at least; 96 takes a third more than it needs."""
    sequences: int
    """In the batch, or packed."""
    longest_q: int
    longest_k: int
    starts_q: Tensor | None
    starts_k: Tensor | None

    @property
    def windowed(self) -> bool:
        return self.window > 0

    @property
    def packed(self) -> bool:
        return self.starts_q is not None


def check(q: Tensor, k: Tensor, v: Tensor, window: int | None, packed: Packed | None) -> None:
    """Raise ValueError for what no attention can be, kernels or eager."""
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or q.shape[3] != k.shape[3] or q.shape[0] != k.shape[0]:
        raise ValueError(
            "attention takes q [b, heads, s, d] and k, v [b, kv heads, t, d], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads: not a multiple")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} keys; at least 1 (a query sees itself), or None for no window")
    if packed is not None and q.shape[0] != 1:
        raise ValueError(f"packed sequences lie in a batch of one, got a batch of {q.shape[0]}")


def describe(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, packed: Packed | None
) -> Problem:
    """The problem for the kernels; ValueError or TypeError naming what they cannot do."""
    check(q, k, v, window, packed)
    head_dim = q.shape[3]
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"the attention kernels take one of bfloat16, float16 and float32, got {q.dtype}, {k.dtype}, {v.dtype}; "
            "the eager table (triloom_kernels.table.eager()) takes any floating-point dtype"
        )
    if not 1 <= head_dim <= WIDEST:
        raise ValueError(f"head dimension {head_dim} is outside 1..{WIDEST}; the eager table takes any")
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    return Problem(
        causal=causal,
        window=window or 0,
        scale=scale,
        width=max(16, 1 << (head_dim - 1).bit_length()),
        sequences=q.shape[0] if packed is None else len(packed.starts_q) - 1,
        longest_q=q.shape[2] if packed is None else packed.longest_q,
        longest_k=k.shape[2] if packed is None else packed.longest_k,
        starts_q=None if packed is None else packed.starts_q,
        starts_k=None if packed is None else packed.starts_k,
    )
