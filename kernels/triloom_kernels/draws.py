"""Counter-based draws in torch operations: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011) on any device.

Element index ``i`` takes word ``i % 4`` of ``philox(counter=i // 4, key)``. An element's index is
``base + sum(i_k * strides[k])`` over its position in the tensor, so that a slice that names its place in the whole
tensor draws what the whole would draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
_CHUNK = 1 << 20
"""Elements drawn at a time: each needs about 100 bytes of scratch."""


def pieces(tensors: tuple[Tensor, ...], base: int, strides: Sequence[int]) -> Iterator[tuple[tuple[Tensor, ...], int]]:
    """Corresponding pieces of at most _CHUNK elements, each with the index of its first element."""
    shape = tensors[0].shape
    if tensors[0].numel() <= _CHUNK:
        yield tensors, base
        return
    dim = max(range(len(shape)), key=lambda k: shape[k])
    half = shape[dim] // 2
    for start, size in ((0, half), (half, shape[dim] - half)):
        parts = tuple(t.narrow(dim, start, size) for t in tensors)
        yield from pieces(parts, base + start * strides[dim], strides)


def indices(like: Tensor, base: int, strides: Sequence[int]) -> Tensor:
    """int64 element indices, of the shape of ``like``."""
    index = torch.full(like.shape, base, dtype=torch.int64, device=like.device)
    for k, (size, step) in enumerate(zip(like.shape, strides, strict=True)):
        shape = [1] * like.dim()
        shape[k] = size
        index += (torch.arange(size, dtype=torch.int64, device=like.device) * step).view(shape)
    return index


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 wraps to the right 64 bits."""
    product = word * factor
    return (product >> 32) & WORD, product & WORD


def philox(counter: Tensor, key: int) -> tuple[Tensor, ...]:
    """The four words (int64 tensors in [0, 2^32)) of Philox4x32-10 at int64 counters >= 0."""
    zero = torch.zeros_like(counter)
    return philox_rounds((counter & WORD, counter >> 32, zero, zero), (key & WORD, key >> 32))


def philox_rounds(c: tuple[Tensor, ...], k: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of four counter words (int64 tensors in [0, 2^32)) and two key words."""
    k0, k1 = k
    for _ in range(10):
        high0, low0 = _multiply(c[0], 0xD2511F53)
        high1, low1 = _multiply(c[2], 0xCD9E8D57)
        c = (high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0)
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c


def words(index: Tensor, key: int) -> Tensor:
    """The word of each index."""
    quad = torch.stack(philox(index >> 2, key))
    return quad.gather(0, (index & 3).unsqueeze(0)).squeeze(0)
