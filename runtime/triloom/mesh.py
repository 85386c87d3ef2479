"""The mesh: named axes of parallelism over the ranks of a world. Pure arithmetic, no process.

Rank r has coordinates given by the mixed-radix digits of r, the *last* axis varying fastest: with
the default order ``(dp, pp, tp)`` the ranks of one tensor-parallel group are neighbours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .errors import MeshError

DEFAULT_ORDER = ("dp", "pp", "tp")


@dataclass(frozen=True)
class Mesh:
    """Ranks arranged on named axes.

    axes: ``(name, size)`` pairs, slowest-varying first; sizes are positive integers.
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        if len(set(names)) != len(names):
            raise MeshError(f"mesh axes must have different names, got {names}")
        for name, size in self.axes:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise MeshError(f"mesh axis {name!r} must have a positive integer size, got {size!r}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    @property
    def size(self) -> int:
        return math.prod(size for _, size in self.axes)

    def axis(self, name: str) -> int:
        """Size of an axis; an axis the mesh does not have counts as 1."""
        return dict(self.axes).get(name, 1)

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank, by axis name."""
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is outside the mesh {self} of {self.size} ranks")
        out: dict[str, int] = {}
        for name, size in reversed(self.axes):
            rank, out[name] = divmod(rank, size)
        return {name: out[name] for name in self.names}

    def rank(self, coords: Mapping[str, int]) -> int:
        """Rank at the given coordinates; axes left out count as 0."""
        r = 0
        for name, size in self.axes:
            c = coords.get(name, 0)
            if not 0 <= c < size:
                raise MeshError(f"coordinate {name}={c} is outside the mesh {self}")
            r = r * size + c
        return r

    def peers(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Ranks that differ from ``rank`` only along the given axes, itself included, in mesh order."""
        return next(group for group in self.partition(*axes) if rank in group)

    def partition(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups along the given axes: disjoint, together every rank, each in mesh order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for r in range(self.size):
            c = self.coords(r)
            key = tuple(c[n] for n in self.names if n not in axes)
            groups.setdefault(key, []).append(r)
        return tuple(tuple(g) for g in groups.values())

    def __str__(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes) or "(one rank)"


def make_mesh(
    world: int,
    *,
    dp: int | None = None,
    pp: int = 1,
    tp: int = 1,
    order: Iterable[str] = DEFAULT_ORDER,
) -> Mesh:
    """Mesh of ``world`` ranks; ``dp=None`` takes what pp and tp leave over.

    Raises MeshError with the arithmetic and the nearest meshes that would work.
    """
    order = tuple(order)
    if sorted(order) != sorted(DEFAULT_ORDER):
        raise MeshError(f"mesh order must name {', '.join(DEFAULT_ORDER)} once each, got {order}")
    for name, size in (("dp", dp), ("pp", pp), ("tp", tp)):
        if size is not None and (not isinstance(size, int) or size < 1):
            raise MeshError(f"parallel size {name} must be a positive integer, got {size!r}")
    inner = pp * tp
    if (dp is None and world % inner) or (dp is not None and dp * inner != world):
        wanted = f"dp={dp} x pp={pp} x tp={tp} = {(dp or 1) * inner}" if dp else f"pp={pp} x tp={tp} = {inner}"
        verb = "must equal" if dp else "must divide"
        near = ", ".join(str(m) for m in nearest_meshes(world, dp=dp, pp=pp, tp=tp))
        raise MeshError(f"{wanted} {verb} the {world} ranks of the world; meshes that work: {near}")
    sizes = {"dp": dp or world // inner, "pp": pp, "tp": tp}
    return Mesh(tuple((name, sizes[name]) for name in order))


def nearest_meshes(world: int, *, dp: int | None, pp: int, tp: int, count: int = 3) -> list[Mesh]:
    """Factorisations of ``world`` closest (in log size per axis) to the wanted one."""

    def distance(m: Mesh) -> float:
        want = {"pp": pp, "tp": tp} | ({} if dp is None else {"dp": dp})
        return sum(abs(math.log(m.axis(n) / w)) for n, w in want.items())

    divisors = [d for d in range(1, world + 1) if world % d == 0]
    all_meshes = [
        Mesh((("dp", world // (p * t)), ("pp", p), ("tp", t)))
        for p, t in itertools.product(divisors, divisors)
        if world % (p * t) == 0
    ]
    return sorted(all_meshes, key=distance)[:count]


def check_divides(what: str, value: int, axis: str, size: int, multiple_of: str = "") -> None:
    """Raise MeshError unless ``size`` (of a mesh axis) divides ``value``; lists the sizes that would."""
    if value % size:
        fits = [d for d in range(1, value + 1) if value % d == 0 and d <= max(size, 8)]
        raise MeshError(
            f"{axis}={size} does not divide {what}={value} ({value} = {value // size} x {size} + {value % size})"
            f"{multiple_of}; {axis} sizes that work: {', '.join(map(str, fits))}"
        )
