"""What the passes know of units and buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..actions import Action, Program
from ..errors import ProgramError
from ..placement import Placement


@dataclass(frozen=True)
class BucketInfo:
    """What the passes know of one bucket of a coordinate's flat layout."""

    index: int
    """Number of the bucket on its coordinate: the k of REDUCE:grads.k."""
    units: tuple[int, ...]
    """Global numbers of the units whose backward adds to a gradient in the bucket."""
    tied: tuple[int, ...] = ()
    """Global numbers of the ties that have a member in the bucket."""
    stays: bool = False
    """Its parameters stay whole, though the placement shards others."""

    def sharded(self, placement: Placement) -> bool:
        """Whether its parameters are whole only around their use."""
        return placement.params.sharded and not self.stays


@dataclass(frozen=True)
class StateLayout:
    """Where units and buckets sit."""

    units: tuple[tuple[int, ...], ...]
    """units[s]: global numbers of the units of stage s, in forward order."""
    buckets: tuple[tuple[BucketInfo, ...], ...]
    """buckets[c]: the buckets of pipeline coordinate c, in index order."""

    def tied_coordinates(self) -> dict[int, tuple[int, ...]]:
        """The coordinates that take part in each tie, in order, by tie number."""
        out: dict[int, list[int]] = {}
        for coord, buckets in enumerate(self.buckets):
            for tie in sorted({t for b in buckets for t in b.tied}):
                out.setdefault(tie, []).append(coord)
        return {tie: tuple(coords) for tie, coords in sorted(out.items())}

    def units_of(self, action: Action) -> tuple[int, ...]:
        """The units a compute action works on, in forward order."""
        index = action.subject.index or 0
        return (index,) if action.subject.kind == "unit" else self.units[index]

    def touched(self, coord: int, action: Action) -> list[BucketInfo]:
        """The buckets of a coordinate that hold parameters of the action's units."""
        units = set(self.units_of(action))
        return [b for b in self.buckets[coord] if units.intersection(b.units)]


def check_layout(program: Program, layout: StateLayout) -> None:
    """Raise ProgramError unless the layout has a row per stage and coordinate and buckets hold own units."""
    counts = (len(layout.units), len(layout.buckets))
    if counts != (len(program.stages), len(program.ranks)):
        raise ProgramError(
            f"the layout has units of {counts[0]} stages and buckets of {counts[1]} coordinates, "
            f"program {program.name!r} has {len(program.stages)} and {len(program.ranks)}"
        )
    for coord, buckets in enumerate(layout.buckets):
        own = {u for s, units in enumerate(layout.units) if program.stages[s] == coord for u in units}
        for k, bucket in enumerate(buckets):
            if bucket.index != k or not bucket.units or not own.issuperset(bucket.units):
                raise ProgramError(
                    f"coordinate {coord} runs units {sorted(own)}; its bucket at place {k} has index {bucket.index} "
                    f"and units {bucket.units}: a bucket needs its place as index and units of its own coordinate"
                )


def check_tie_order(layout: StateLayout) -> None:
    """Two coordinates must come to their common ties in the same order."""
    order = [[t for b in by_tie(buckets) for t in sorted(b.tied)] for buckets in layout.buckets]
    for a in range(len(order)):
        for b in range(a):
            common = set(order[a]) & set(order[b])
            seen_a, seen_b = ([t for t in order[c] if t in common] for c in (a, b))
            if seen_a != seen_b:
                raise ProgramError(
                    f"coordinates {b} and {a} would sum their common ties in the orders {seen_b} and {seen_a}: "
                    "give tied parameters that share a bucket on one coordinate neighbouring tie numbers"
                )


def by_tie(buckets: Sequence[BucketInfo]) -> list[BucketInfo]:
    """Buckets with ties, in the order in which every coordinate sums them."""
    return sorted((b for b in buckets if b.tied), key=lambda b: sorted(b.tied))
