"""Shares of several sources, sample by sample: a short pattern that repeats. Pure.

The pattern is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): after any number of
samples each source has been used within 1 - 1 / (2k - 2) of its share, k being the number of sources. A pattern
ends with every share met exactly, so any sample's source and its number within that source follow from the sample's
index alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

LONGEST = 10_000
"""Samples of the longest pattern: shares are met to 1 / LONGEST."""


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the ratio of ``weights`` (as written in decimal), exactly if their sum stays within LONGEST.

    Otherwise their sum is LONGEST, rounded by largest remainder. Raises ConfigError for a weight that rounds to none.
    """
    exact = [Fraction(repr(float(w))) for w in weights]
    parts = [w / sum(exact) for w in exact]
    period = lcm(*(p.denominator for p in parts))
    if period <= LONGEST:
        return tuple(int(p * period) for p in parts)
    floors = [int(p * LONGEST) for p in parts]
    rest = sorted(range(len(parts)), key=lambda k: (floors[k] - parts[k] * LONGEST, k))
    for k in rest[: LONGEST - sum(floors)]:
        floors[k] += 1
    if 0 in floors:
        small = weights[floors.index(0)]
        raise ConfigError(f"data.weights: {small:g} is less than 1 / {LONGEST} of their sum; leave that source out")
    return tuple(floors)


def pattern(counts: Sequence[int]) -> NDArray[np.int64]:
    """Source of each of ``sum(counts)`` samples, source k ``counts[k]`` times, as evenly as can be."""
    period, sources = sum(counts), len(counts)
    if sources == 1:
        return np.zeros(period, dtype=np.int64)
    used = [0] * sources
    every = lcm(*counts)  # makes whole numbers of what is compared
    out = np.empty(period, dtype=np.int64)
    slack = 2 * sources - 2
    for n in range(1, period + 1):
        # Shares that may be served: counts[k] n / period - used[k] >= 1 / slack. Of them the one due first,
        # (used[k] + 1 - 1 / slack) period / counts[k].
        due = [k for k in range(sources) if slack * (counts[k] * n - used[k] * period) >= period]
        chosen = min(due, key=lambda k: ((slack * (used[k] + 1) - 1) * (every // counts[k]), k))
        used[chosen] += 1
        out[n - 1] = chosen
    return out


def places(order: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often a sample's source was used before it in the pattern."""
    out = np.empty_like(order)
    for source in range(int(order.max()) + 1):
        mine = order == source
        out[mine] = np.arange(int(mine.sum()))
    return out
