"""Skip connections between units that are not neighbours: the units between carry the tensor through.

A unit has one pytree in and one out, so what a later unit needs travels with it, through every stage between. The
gradient comes back the same way and is added where the tensor was made. Costs, for each skip of n bytes: n bytes on
each hop between the two stages and n back, where a direct transfer would take one hop each way (it would take room on
the way in neither case: a stage between holds the tensor until its backward, as its own input), and 7 us a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..scope import Scope
from .build import UnitLike


def with_skips(
    units: Sequence[UnitLike] | Mapping[str, UnitLike], skips: Iterable[tuple[str, str]]
) -> dict[str, UnitLike]:
    """The units, with the output of some handed to later ones as well.

    skips: pairs (source, target) of unit names (of a sequence, ``"0"``, ``"1"``, ...). The target is called with its
    usual input and then the outputs of its sources, in the order of the pairs. Modules keep their parameters' names:
    they are given a class that knows what to carry.

    Raises ConfigError for a unit that does not exist, or a target that does not come after its source.
    """
    named = dict(units) if isinstance(units, Mapping) else {str(i): u for i, u in enumerate(units)}
    pairs, place = list(skips), {name: i for i, name in enumerate(named)}
    for source, target in pairs:
        for name in (source, target):
            if name not in place:
                raise ConfigError(
                    f"the skip {(source, target)} is of a unit {name!r}; the units are {', '.join(named)}"
                )
        if place[target] <= place[source]:
            raise ConfigError(f"the skip {(source, target)} goes backwards: a unit is fed by units before it")
    roles = {name: _Role(name, pairs, place) for name in named}
    return {name: _give(unit, roles[name]) if roles[name].any else unit for name, unit in named.items()}


class _Role:
    """What a unit does for skips: which it starts, carries on, and takes."""

    def __init__(self, name: str, pairs: Sequence[tuple[str, str]], place: Mapping[str, int]) -> None:
        here = place[name]
        alive = {s for s, t in pairs if place[s] < here <= place[t]}
        self.starts = name in {s for s, _ in pairs}
        self.name, self.takes = name, [s for s, t in pairs if t == name]
        self.keeps = [s for s in place if s in alive and any(place[t] > here for s2, t in pairs if s2 == s)]
        self.enters = bool(alive)
        """Whether what comes in has skips with it."""
        self.any = self.enters or self.starts

    def run(self, forward: Callable[..., Any], given: Any) -> Any:
        x, carried = given if self.enters else (given, {})
        out = forward(x, *(carried[s] for s in self.takes))
        after = {s: carried[s] for s in self.keeps} | ({self.name: out} if self.starts else {})
        return (out, after) if after else out


def _give(unit: UnitLike, role: _Role) -> UnitLike:
    if isinstance(unit, nn.Module):
        return _carrying(unit, role)

    def build(scope: Scope) -> nn.Module:
        return _carrying(unit(scope), role)

    return build


def _carrying(unit: nn.Module, role: _Role) -> nn.Module:
    cls: Any = type(unit)

    def forward(self: Any, given: Any) -> Any:
        return role.run(lambda *args: cls.forward(self, *args), given)

    unit.__class__ = type(cls.__name__, (cls,), {"forward": forward})
    return unit
