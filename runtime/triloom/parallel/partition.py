"""Which units make up which stage. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError
from ..shards import split_even


def partition(units: int, stages: int, sizes: Sequence[int] | None = None) -> tuple[range, ...]:
    """Contiguous runs of units, one per stage; ``sizes`` gives explicit counts.

    Raises ConfigError if there are fewer units than stages or the counts do not add up.
    """
    if sizes is None:
        if units < stages:
            raise ConfigError(
                f"{stages} pipeline stages need at least {stages} units (loss included), the model has {units}; "
                f"use pp <= {units} or cut the model into more units"
            )
        return tuple(range(a, b) for a, b in split_even(units, stages))
    if len(sizes) != stages or sum(sizes) != units or min(sizes, default=0) < 1:
        raise ConfigError(
            f"stage sizes {tuple(sizes)} must be {stages} positive counts that sum to {units} units, "
            f"got {len(sizes)} counts with sum {sum(sizes)}"
        )
    out, start = [], 0
    for n in sizes:
        out.append(range(start, start + n))
        start += n
    return tuple(out)
