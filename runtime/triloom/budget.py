"""Which units to recompute so that activations fit into a number of bytes, at the least cost. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .actions import Action
from .errors import ConfigError
from .memory import BucketBytes, Sizes, UnitBytes, walk
from .passes import StateLayout


class BudgetError(ConfigError):
    """No set of units would fit."""


_STEPS = 2048
"""Resolution of the knapsack: savings are rounded down to this part of what is needed."""


def activation_peak(
    row: Sequence[Action], layout: StateLayout, sizes: Sizes, recomputed: frozenset[int], buckets: int
) -> int:
    """Highest bytes of activations of a coordinate's actions."""
    none = [BucketBytes()] * buckets
    return walk(row, layout, sizes, state={}, buckets=none, recomputed=recomputed).peak["activations"]


def fit(
    row: Sequence[Action], layout: StateLayout, coord: int, sizes: Mapping[int, UnitBytes], budget: int
) -> frozenset[int]:
    """The cheapest units of a coordinate to recompute so that its activations stay within ``budget`` bytes.

    row: the coordinate's actions, with an R before each backward; sizes: by unit, those of neighbours that send
    included. Raises BudgetError with the least that is possible.
    """
    last = max(u for units in layout.units for u in units)
    here = sorted({u for a in row if a.op == "F" for u in layout.units_of(a)} - {last})

    def peak(recomputed: frozenset[int]) -> int:
        of_unit: Sizes = lambda u, m: sizes.get(u, UnitBytes())  # noqa: E731  (a table in the form that walk takes)
        return activation_peak(row, layout, of_unit, recomputed, len(layout.buckets[coord]))

    flying = _in_flight(row, layout, here)
    items = {u: (flying[u] * sizes[u].held, sizes[u].flops) for u in here}
    return choose(peak, items, budget)


def _in_flight(row: Sequence[Action], layout: StateLayout, units: Sequence[int]) -> dict[int, int]:
    """Most microbatches of each unit between forward and backward."""
    now, most = dict.fromkeys(units, 0), dict.fromkeys(units, 0)
    for a in row:
        if a.op in ("F", "B", "BW"):
            for u in layout.units_of(a):
                if u in now:
                    now[u] += 1 if a.op == "F" else -1
                    most[u] = max(most[u], now[u])
    return most


def choose(peak: Callable[[frozenset[int]], int], items: Mapping[int, tuple[int, int]], budget: int) -> frozenset[int]:
    """The units to recompute. peak: bytes when these are recomputed; items: (bytes saved, cost) by unit.

    A recomputed unit is whole again at its backward, so what is needed grows until ``peak`` is content.
    """
    excess = peak(frozenset()) - budget
    if excess <= 0:
        return frozenset()
    everything = frozenset(items)
    least = peak(everything)
    if least > budget:
        raise BudgetError(
            f"activation_bytes = {budget} cannot be reached: with every unit but the loss recomputed this rank still "
            f"holds {least} bytes; raise it, use more microbatches, or split the model over more ranks"
        )
    need = excess
    while need < sum(saved for saved, _ in items.values()):
        chosen = cheapest(items, need)
        over = peak(chosen) - budget
        if over <= 0:
            return chosen
        need += over
    return everything


def cheapest(items: Mapping[int, tuple[int, int]], need: int) -> frozenset[int]:
    """The least costly set of keys whose savings add up to ``need``: a covering knapsack, exact but for rounding.

    items: (saved, cost) by key. All of them if their rounded savings do not suffice. O(items x 2048).
    """
    unit = max(1, need // _STEPS)
    goal = -(-need // unit)
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    for key, (saved, cost) in sorted(items.items()):
        gain = saved // unit
        if not gain:
            continue
        for have, (spent, keys) in list(best.items()):
            level = min(goal, have + gain)
            candidate = (spent + cost, (*keys, key))
            if level not in best or candidate < best[level]:
                best[level] = candidate
    return frozenset(best[goal][1]) if goal in best else frozenset(items)
