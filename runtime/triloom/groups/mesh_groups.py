"""The groups of a mesh: one per combination of axes, created once in a fixed order on every rank."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import MeshError
from ..mesh import Mesh
from .base import Group
from .links import Links, make_links
from .objects import agree
from .solo import Solo

AXES = (("tp",), ("pp",), ("dp",), ("dp", "tp"), ("pp", "tp"), ("dp", "pp"))
"""Axis combinations that the runtime uses, besides the whole world."""


class MeshGroups:
    """Groups of one rank, by axis combination; made by :func:`mesh_groups`."""

    def __init__(
        self, mesh: Mesh, world: Group, groups: dict[tuple[str, ...], Group], links: Links | None = None
    ) -> None:
        self.mesh = mesh
        self.world = world
        self.coords = mesh.coords(world.rank)
        self._groups = groups
        self._links = links

    @property
    def lanes(self) -> str:
        """How posted operations of a rank progress: a row of ``triloom.lanes.NAMED``."""
        return "independent" if self._links is None else "per_direction"

    def axis(self, name: str) -> Group:
        """The ranks that differ from this one only along one axis, in the order of their coordinate."""
        return self.over(name)

    def over(self, *axes: str) -> Group:
        """The ranks that differ from this one only along the given axes, in mesh order."""
        wide = _wide(self.mesh, axes)
        if wide == _wide(self.mesh, self.mesh.names):
            return self.world
        if wide not in self._groups:
            made = ", ".join("+".join(key) for key in self._groups if key) or "none"
            raise MeshError(
                f"no group over {'+'.join(axes)} was made for the mesh {self.mesh}; made: {made}. "
                "Name it in mesh_groups(..., combinations=...)"
            )
        return self._groups[wide]

    def link(self, peer: int, direction: str) -> tuple[Group, int]:
        """Group and rank in it for transfers with pipeline coordinate ``peer``; direction: "send" or "recv".

        Both directions share a pp group whose operations are independent. One with FIFO lanes has a
        group of two ranks for every direction between neighbours on the ring of pipeline coordinates.
        """
        if direction not in ("send", "recv"):
            raise MeshError(f"a link has direction 'send' or 'recv', got {direction!r}")
        pp = self.axis("pp")
        if not 0 <= peer < pp.size or peer == self.coords.get("pp", 0):
            raise MeshError(f"pipeline coordinate {self.coords.get('pp', 0)} has no link to {peer} in {self.mesh}")
        if self._links is None:
            return pp, peer
        if (peer, direction) not in self._links:
            raise MeshError(
                f"pipeline coordinates {self.coords['pp']} and {peer} of {self.mesh} are no neighbours on the ring, so "
                "there is no link between them"
            )
        return self._links[peer, direction]

    def check(self) -> None:
        """Collective over all ranks, between operations: raise unless they have issued the same ones so far."""
        for group in (self.world, *self._groups.values(), *self._link_groups()):
            group.check()

    def _link_groups(self) -> list[Group]:
        return [] if self._links is None else [group for group, _ in self._links.values()]

    def close(self) -> None:
        """Close the sub-groups; the world stays the caller's."""
        for link in self._link_groups():
            link.close()
        for group in self._groups.values():
            group.close()


def mesh_groups(world: Group, mesh: Mesh, combinations: Iterable[tuple[str, ...]] = AXES) -> MeshGroups:
    """Make the sub-groups of ``mesh``; collective over ``world``, whose ranks are the mesh's ranks.

    Axes of size 1 are dropped from a combination (nothing left: a Solo group), the whole world is
    ``world`` itself, and combinations that come out equal are one group. Groups that connect on first use
    are connected here. Raises MeshError if the
    world has another size, MismatchError if the ranks disagree on mesh or combinations.
    """
    if world.size != mesh.size:
        raise MeshError(f"the mesh {mesh} has {mesh.size} ranks, the group {world.name!r} has {world.size}")
    combinations = tuple(combinations)
    agree(world, "the mesh and its groups", [mesh.axes, combinations])
    groups: dict[tuple[str, ...], Group] = {}
    everything = _wide(mesh, mesh.names)
    for axes in combinations:
        key = _wide(mesh, axes)
        if key in groups or (key and key == everything):
            continue
        name = "+".join(key) or "solo"
        groups[key] = world.split(mesh.partition(*key), name) if key else Solo(world.members[world.rank], name)
    if not everything:
        groups.setdefault((), Solo(world.members[world.rank]))
    for group in groups.values():
        group.warm()
    pp = groups.get(("pp",), world)
    fifo = mesh.axis("pp") > 1 and pp.lanes == "fifo"
    return MeshGroups(mesh, world, groups, make_links(pp) if fifo else None)


def _wide(mesh: Mesh, axes: Iterable[str]) -> tuple[str, ...]:
    """The given axes of size above 1, in mesh order."""
    wanted = set(axes)
    return tuple(name for name in mesh.names if name in wanted and mesh.axis(name) > 1)
