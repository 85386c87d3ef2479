"""From a user's units to the modules, parameters and ties of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError
from ..groups.base import Group
from ..groups.mesh_groups import MeshGroups
from ..groups.solo import Solo
from ..mesh import check_divides
from ..scope import Scope
from ..shards import ShardSpec
from . import ties as tied
from .guard import ShardedParameter
from .sharded import LocalParam, ShardedState
from .ties import Tie

UnitLike = nn.Module | Callable[[Scope], nn.Module]
"""A module, or a function that builds it (so that only the ranks that run a unit hold it)."""

LOSS = "loss"
"""Name of the loss unit."""


def name_units(units: Sequence[UnitLike] | Mapping[str, UnitLike], loss: UnitLike) -> dict[str, UnitLike]:
    """All units by name, the loss last."""
    named = dict(units) if isinstance(units, Mapping) else {str(i): u for i, u in enumerate(units)}
    if LOSS in named:
        raise ConfigError(f"the unit name {LOSS!r} belongs to the loss; give the unit another name")
    for name, unit in [*named.items(), (LOSS, loss)]:
        if not callable(unit):
            raise ConfigError(f"unit {name!r} is a {type(unit).__name__}; give an nn.Module or a function of a Scope")
    return {**named, LOSS: loss}


def build_units(named: Mapping[str, UnitLike], wanted: Sequence[int], scope: Scope) -> dict[int, nn.Module]:
    """The wanted units by number, on the scope's device."""
    out: dict[int, nn.Module] = {}
    for index, (name, unit) in enumerate(named.items()):
        if index not in wanted:
            continue
        scope.unit = index
        module = unit if isinstance(unit, nn.Module) else _call(name, unit, scope)
        if name == LOSS and not callable(getattr(module, "weight", None)):
            raise ConfigError(
                f"the loss unit {type(module).__name__} needs a method weight(targets); it returns (sum, weight) "
                "from forward(x, targets). Wrap a mean loss as triloom.mean_loss(function)"
            )
        there = all(t.device == scope.device for t in (*module.parameters(), *module.buffers()))
        out[index] = module if there else module.to(scope.device)
    return out


def _call(name: str, factory: Callable[[Scope], nn.Module], scope: Scope) -> nn.Module:
    hint = "wrap a plain loss function as triloom.mean_loss(function)"
    try:
        module = factory(scope)
    except TypeError as error:
        raise ConfigError(f"unit {name!r}: {factory!r} is not a function of a Scope ({error}); {hint}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"unit {name!r} built a {type(module).__name__}, not an nn.Module; {hint}")
    return module


def find_ties(
    named: Mapping[str, UnitLike], explicit: Sequence[Sequence[str]], coord_of: Sequence[int]
) -> tuple[Tie, ...]:
    """Ties given by name, and those a user made by using one Parameter object in several units."""
    modules = {n: u for n, u in named.items() if isinstance(u, nn.Module)}
    implicit = [group for group in tied.shared_names(modules) if not any(group[0] in e for e in explicit)]
    unit_of = {name: i for i, name in enumerate(named)}
    return tied.resolve([*explicit, *implicit], unit_of, coord_of)


class Collector:
    """Finds every use of every trainable parameter of a rank, unit by unit in order; tied uses are made one object.

    names: of all units; ties: of the whole model.
    """

    def __init__(self, names: Sequence[str], ties: Sequence[Tie]) -> None:
        self._names, self._ties = names, ties
        self._by_use = {name: t for t in ties for name in t.names}
        self._first: dict[int, tuple[str, nn.Parameter]] = {}

    def add(self, unit: int, module: nn.Module) -> list[LocalParam]:
        """The uses in a unit (again: of what requires a gradient now)."""
        out: list[LocalParam] = []
        for owner, local, full in _parameters(module):
            name = f"{self._names[unit]}.{full}"
            param = owner._parameters[local]
            tie = self._by_use.get(name)
            if param is None:
                continue
            if tie is not None:
                param = _join(self._first.setdefault(tie.index, (name, param)), name, owner, local, param)
            if param.requires_grad:
                spec = getattr(owner, "shards", {}).get(local) or ShardSpec(tuple(param.shape))
                out.append(LocalParam(tie.names[0] if tie else name, unit, param, spec, tie))
        return out

    def check_ties(self, modules: Mapping[int, nn.Module]) -> None:
        """Raise ConfigError if a tied parameter of these units does not exist."""
        _check_ties_found(self._ties, self._names, modules)


def collect(named: Mapping[str, UnitLike], modules: Mapping[int, nn.Module], ties: Sequence[Tie]) -> list[LocalParam]:
    """Every use of every trainable parameter of these units, in unit order, tied uses made one object."""
    collector = Collector(list(named), ties)
    out = [p for u in sorted(modules) for p in collector.add(u, modules[u])]
    collector.check_ties(modules)
    return out


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(owner, local name, full name) of each distinct parameter of a unit."""
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for local, p in owner._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield owner, local, f"{prefix}.{local}" if prefix else local


def _join(
    first: tuple[str, nn.Parameter], name: str, owner: nn.Module, local: str, param: nn.Parameter
) -> nn.Parameter:
    first_name, one = first
    if one.shape != param.shape:
        raise ConfigError(
            f"tied parameters differ in shape: {first_name} {tuple(one.shape)}, {name} {tuple(param.shape)}"
        )
    if one is not param:
        owner._parameters[local] = one
    return one


def _check_ties_found(ties: Sequence[Tie], names: Sequence[str], modules: Mapping[int, nn.Module]) -> None:
    have = {f"{names[u]}.{n}" for u, m in modules.items() for n, _ in m.named_parameters(remove_duplicate=False)}
    for tie in ties:
        for name, unit in zip(tie.names, tie.units, strict=True):
            if unit in modules and name not in have:
                near = sorted(n for n in have if n.startswith(names[unit] + "."))
                raise ConfigError(f"tied parameter {name!r} does not exist; unit {names[unit]!r} has {near}")


def tie_groups(ties: Sequence[Tie], pp: Group) -> dict[int, Group]:
    """A group over the coordinates of each tie that spans several; collective over pp."""
    out: dict[int, Group] = {}
    for tie in ties:
        members = tie.members()
        if len(members) > 1:
            group = pp.split([members], f"tie{tie.index}")
            if pp.rank in members:
                out[tie.index] = group
    return out


def shard_groups(dp: Group, shard_ranks: int | None) -> tuple[Group, Group]:
    """The dp ranks that state is sharded over, and those that hold the same shard; collective over dp."""
    if shard_ranks is None or shard_ranks == dp.size:
        return dp, Solo(dp.members[dp.rank])
    check_divides("data-parallel ranks dp", dp.size, "shard_ranks", shard_ranks)
    blocks = [list(range(first, first + shard_ranks)) for first in range(0, dp.size, shard_ranks)]
    across = [[block[i] for block in blocks] for i in range(shard_ranks)]
    return dp.split(blocks, "shard"), dp.split(across, "replicas")


def replicate(modules: Mapping[int, nn.Module], params: Sequence[LocalParam], groups: MeshGroups) -> None:
    """Give replicated parameters and buffers the values of the first dp and tp rank that holds them. Whose the buffers
    are from then on says :mod:`.buffers`.

    Own layers draw the same values everywhere; a user's modules were initialised by each rank's own
    generator. Costs one broadcast of the model at start.
    """
    sharded = {id(p.param) for p in params if p.spec.dim is not None}
    for u in sorted(modules):
        for t in [*modules[u].parameters(), *modules[u].buffers()]:
            if isinstance(t, ShardedParameter):  # a further use of a tied one, that an earlier unit has brought
                continue
            data = t.data.contiguous()
            for group in (groups.axis("dp"), *(() if id(t) in sharded else (groups.axis("tp"),))):
                broadcast(group, data)
            t.data.copy_(data)


def replicate_ties(state: ShardedState, ties: Mapping[int, Group]) -> None:
    """Give parameters that are tied across pipeline coordinates the values of the first of these."""
    tied_params = {p.tie.index: p for p in state.params.values() if p.tie is not None and p.tie.index in ties}
    with state.gathered([p.name for p in tied_params.values()]):
        for index, p in sorted(tied_params.items()):
            broadcast(ties[index], p.param.data)


def broadcast(group: Group, data: torch.Tensor) -> None:
    """``data`` (contiguous, of any dtype but complex) as the first rank of the group has it."""
    if group.size > 1:
        as_bytes: Any = data.to(torch.int64) if not data.is_floating_point() else data
        group.broadcast(as_bytes, 0).wait()
        if as_bytes is not data:
            data.copy_(as_bytes)


class MeanLoss(nn.Module):
    """A loss that averages over the samples of a microbatch, as a loss unit (sum, weight)."""

    def __init__(self, function: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any, targets: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight = self.weight(targets)
        loss = self.function(x, targets)
        return loss * weight.to(loss.dtype), weight

    def weight(self, targets: Any) -> torch.Tensor:
        first = pytree.tree_leaves(targets)[0]
        return torch.tensor(float(first.shape[0]))


def mean_loss(function: Callable[[Any, Any], torch.Tensor]) -> MeanLoss:
    """``function(outputs, targets)`` returning the mean over samples (``F.mse_loss``, ``F.cross_entropy``)."""
    return MeanLoss(function)
