"""Tied parameters: one value, several uses, one accumulator a use, summed in unit order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError


@dataclass(frozen=True)
class Tie:
    """Uses of one value, in unit order. The first use's name is the value's name."""

    index: int
    names: tuple[str, ...]
    units: tuple[int, ...]
    coords: tuple[int, ...]
    """Pipeline coordinate of each use."""

    def members(self) -> tuple[int, ...]:
        """Coordinates that hold the value, ascending."""
        return tuple(sorted(set(self.coords)))


def shared_names(units: Mapping[str, torch.nn.Module]) -> list[tuple[str, ...]]:
    """Names under which the same Parameter object appears in several units."""
    seen: dict[int, list[str]] = {}
    for unit_name, module in units.items():
        for name, p in module.named_parameters():
            seen.setdefault(id(p), []).append(f"{unit_name}.{name}")
    return [tuple(names) for names in seen.values() if len(names) > 1]


def resolve(groups: Sequence[Sequence[str]], unit_of: Mapping[str, int], coord_of: Sequence[int]) -> tuple[Tie, ...]:
    """Ties from groups of global parameter names.

    unit_of: unit number by unit name; coord_of: pipeline coordinate of each unit. Raises
    ConfigError for a name whose unit does not exist or that stands in two groups.
    """
    ties: list[Tie] = []
    taken: set[str] = set()
    for group in groups:
        uses = sorted((find_unit(name, unit_of), name) for name in group)
        for _, name in uses:
            if name in taken:
                raise ConfigError(f"parameter {name!r} stands in two ties; put all its uses into one")
            taken.add(name)
        units = tuple(u for u, _ in uses)
        ties.append(Tie(len(ties), tuple(n for _, n in uses), units, tuple(coord_of[u] for u in units)))
    return tuple(ties)


def find_unit(name: str, unit_of: Mapping[str, int]) -> int:
    """Number of the unit that a global parameter name belongs to (the longest unit name that fits)."""
    fits = [u for u in unit_of if name.startswith(u + ".")]
    if not fits:
        raise ConfigError(f"tied parameter {name!r} belongs to no unit; units: {', '.join(unit_of)}")
    return unit_of[max(fits, key=len)]


def sum_uses(gathered: torch.Tensor, order: Sequence[tuple[int, int]], out: torch.Tensor) -> None:
    """``out`` = sum over uses in unit order. gathered: [coordinate, local use, numel]."""
    first, *rest = order
    out.copy_(gathered[first].view_as(out))
    for place in rest:
        out.add_(gathered[place].view_as(out))
