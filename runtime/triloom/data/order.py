"""The order of samples: a permutation computed one index at a time, never stored. Pure.

A balanced Feistel network over the smallest 4^k that holds the domain is a permutation whatever its
round function is; indices that land outside the domain are sent through again until they fall inside
("cycle walking", Black and Rogaway 2002), which keeps it a permutation of the domain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.uint64]

_ROUNDS = 6


def mix(x: Indices) -> Indices:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit integers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys(seed: int, *parts: int) -> Indices:
    """Round keys of (seed, parts), as an array of 64-bit integers."""
    state = np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    for part in parts:
        state = mix(state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF)
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix(state + steps)


def permute(indices: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Images of ``indices`` (each in [0, size)) under the permutation of (seed, epoch)."""
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    round_keys = keys(seed, epoch)
    out = _feistel(indices.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(out >= np.uint64(size))
    while outside.size:
        out[outside] = _feistel(out[outside], half, round_keys)
        outside = outside[out[outside] >= np.uint64(size)]
    return out.astype(np.int64)


def _feistel(x: Indices, half: np.uint64, round_keys: Indices) -> Indices:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for key in round_keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << half) | right
