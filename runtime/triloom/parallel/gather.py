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
    local: Mapping[str, torch.Tensor], specs: Mapping[str, ShardSpec], groups: MeshGroups
) -> dict[str, torch.Tensor]:
    """Whole tensors by global name, on every rank (so every rank must hold the whole model).

    local: this rank's tp shards, whole over dp. Collective over tp and pp.
    """
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
                device = next(iter(local.values())).device if local else torch.device("cpu")
                whole = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            if pp.size > 1:
                pp.broadcast(whole, owner).wait()
            out.setdefault(name, whole)
    return out


def _assemble(shard: torch.Tensor, spec: ShardSpec, tp: Group) -> torch.Tensor:
    if spec.dim is None or tp.size == 1:
        return shard.clone().contiguous()
    if shard.dim() != len(spec.global_shape):
        raise ConfigError(
            f"a state of shape {tuple(shard.shape)} for a parameter of shape {spec.global_shape}, of which "
            f"tp={tp.size} ranks hold parts, cannot be assembled; ask for one that has the parameter's shape"
        )
    slices: list[Any] = gather_objects(tp, list(spec.slices))
    lengths = [sum(hi - lo for lo, hi in s) for s in slices]
    rest = shard.movedim(spec.dim, 0)
    padded = rest.new_zeros(max(lengths), *rest.shape[1:])
    padded[: rest.shape[0]] = rest
    gathered = padded.new_empty(tp.size, *padded.shape)
    tp.all_gather(gathered, padded).wait()
    whole = rest.new_empty(spec.global_shape[spec.dim], *rest.shape[1:])
    for rank, parts in enumerate(slices):
        start = 0
        for lo, hi in parts:
            whole[lo:hi] = gathered[rank, start : start + hi - lo]
            start += hi - lo
    return whole.movedim(0, spec.dim).contiguous()
