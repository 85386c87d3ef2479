"""The whole state, assembled from all ranks: for tests, export and small models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConfigError
from ..groups.base import Group
from ..groups.mesh_groups import MeshGroups
from ..groups.objects import broadcast_object, gather_objects
from ..shards import ShardSpec


def gather_full(
    local: Mapping[str, torch.Tensor],
    specs: Mapping[str, ShardSpec],
    groups: MeshGroups,
    device: torch.device | None = None,
) -> dict[str, torch.Tensor]:
    """Whole tensors by global name, on every rank (so every rank must hold the whole model).

    local: this rank's tp shards, whole over dp; device: where they are, for a rank that may have none. Collective
    over tp and pp.
    """
    device = device or (next(iter(local.values())).device if local else torch.device("cpu"))
    pp, tp = groups.axis("pp"), groups.axis("tp")
    out: dict[str, torch.Tensor] = {}
    for owner in range(pp.size):
        mine = [
            [n, str(t.dtype).removeprefix("torch."), list(t.shape if specs[n].dim is None else specs[n].global_shape)]
            for n, t in local.items()
        ]
        for name, dtype, shape in broadcast_object(pp, mine if pp.rank == owner else None, owner):
            if pp.rank == owner:
                whole = _assemble(local[name], specs[name], tp)
            else:
                whole = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if pp.size > 1:
                pp.broadcast(whole, owner).wait()
            out.setdefault(name, whole)
    return out


class TpParts:
    """A parameter that is split over tp: put together from every rank's part, and taken apart. Collective over tp,
    the constructor too."""

    def __init__(self, spec: ShardSpec, tp: Group) -> None:
        if spec.dim is None:
            raise ConfigError(f"{spec} is not split")
        self._spec, self._dim, self._tp = spec, spec.dim, tp
        self._slices: list[Any] = gather_objects(tp, list(spec.slices))
        self._longest = max(sum(hi - lo for lo, hi in s) for s in self._slices)

    def whole(self, shard: torch.Tensor) -> torch.Tensor:
        """The whole tensor, contiguous, on every rank. shard: of the local shape."""
        rest = shard.movedim(self._dim, 0)
        padded = rest.new_zeros(self._longest, *rest.shape[1:])
        padded[: rest.shape[0]] = rest
        gathered = padded.new_empty(self._tp.size, *padded.shape)
        self._tp.all_gather(gathered, padded).wait()
        whole = rest.new_empty(self._spec.global_shape[self._dim], *rest.shape[1:])
        for rank, parts in enumerate(self._slices):
            start = 0
            for lo, hi in parts:
                whole[lo:hi] = gathered[rank, start : start + hi - lo]
                start += hi - lo
        return whole.movedim(0, self._dim).contiguous()

    def mine(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, contiguous."""
        return torch.cat([whole.narrow(self._dim, lo, hi - lo) for lo, hi in self._spec.slices], self._dim)


def _assemble(shard: torch.Tensor, spec: ShardSpec, tp: Group) -> torch.Tensor:
    if spec.dim is None or tp.size == 1:
        return shard.clone().contiguous()
    if shard.dim() != len(spec.global_shape):
        raise ConfigError(
            f"a state of shape {tuple(shard.shape)} for a parameter of shape {spec.global_shape}, of which "
            f"tp={tp.size} ranks hold parts, cannot be assembled; ask for one that has the parameter's shape"
        )
    return TpParts(spec, tp).whole(shard)
