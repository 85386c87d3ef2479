"""The groups of a mesh: one per combination of axes, created once in a fixed order on every rank."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import MeshError
from ..mesh import Mesh
from .base import Group
from .objects import agree
from .solo import Solo

AXES = (("tp",), ("pp",), ("dp",), ("dp", "tp"), ("pp", "tp"), ("dp", "pp"))
"""Axis combinations that the runtime uses, besides the whole world."""


class MeshGroups:
    """Groups of one rank, by axis combination; made by :func:`mesh_groups`."""

    def __init__(self, mesh: Mesh, world: Group, groups: dict[tuple[str, ...], Group]) -> None:
        self.mesh = mesh
        self.world = world
        self.coords = mesh.coords(world.rank)
        self._groups = groups

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

        Host groups have independent operations, so both directions share the pp group.
        """
        if direction not in ("send", "recv"):
            raise MeshError(f"a link has direction 'send' or 'recv', got {direction!r}")
        pp = self.axis("pp")
        if not 0 <= peer < pp.size or peer == self.coords.get("pp", 0):
            raise MeshError(f"pipeline coordinate {self.coords.get('pp', 0)} has no link to {peer} in {self.mesh}")
        return pp, peer

    def close(self) -> None:
        """Close the sub-groups; the world stays the caller's."""
        for group in self._groups.values():
            group.close()


def mesh_groups(world: Group, mesh: Mesh, combinations: Iterable[tuple[str, ...]] = AXES) -> MeshGroups:
    """Make the sub-groups of ``mesh``; collective over ``world``, whose ranks are the mesh's ranks.

    Axes of size 1 are dropped from a combination (nothing left: a Solo group), the whole world is
    ``world`` itself, and combinations that come out equal are one group. Raises MeshError if the
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
    return MeshGroups(mesh, world, groups)


def _wide(mesh: Mesh, axes: Iterable[str]) -> tuple[str, ...]:
    """The given axes of size above 1, in mesh order."""
    wanted = set(axes)
    return tuple(name for name in mesh.names if name in wanted and mesh.axis(name) > 1)
