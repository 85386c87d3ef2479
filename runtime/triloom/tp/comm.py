"""Communication between the ranks of a tensor-parallel group as differentiable maps.

Each function is a linear map over the group together with its adjoint; on a group of one rank it is
the identity and leaves no trace in the autograd graph. Sequence maps work along dim 0.

    function                     forward              backward
    copy_to_tp                   identity             all_reduce
    reduce_from_tp               all_reduce           identity
    scatter_to_sequence          this rank's chunk    all_gather
    gather_from_sequence         all_gather           reduce_scatter
    reduce_scatter_to_sequence   reduce_scatter       all_gather
    unscatter_from_sequence      all_gather           this rank's chunk

``gather_from_sequence`` is for what then differs over the ranks (a column-parallel layer),
``unscatter_from_sequence`` for what every rank then computes alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..groups.base import Group, Work

Map = Callable[[Tensor, Group], Tensor]


def start_gather(x: Tensor, group: Group) -> tuple[Tensor, Work]:
    """``[n, ...]`` of every rank -> ``[n * size, ...]``, ready when the Work is done."""
    out = x.new_empty(x.shape[0] * group.size, *x.shape[1:])
    return out, group.all_gather(out, x.contiguous())


def start_reduce_scatter(x: Tensor, group: Group) -> tuple[Tensor, Work]:
    """``[n * size, ...]`` -> this rank's chunk ``[n, ...]`` of the sum over ranks, ready when the Work is done."""
    check_sequence(x.shape[0], group)
    out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
    return out, group.reduce_scatter(out, x.contiguous())


def check_sequence(length: int, group: Group) -> None:
    """Raise ConfigError unless the sequence splits over the group."""
    if length % group.size:
        below = length - length % group.size
        raise ConfigError(
            f"sequence parallelism on rank {group.rank} of {group.name!r}: tp={group.size} does not divide the "
            f"sequence length {length}; use a length of {below} or {below + group.size}, or sequence_parallel=False"
        )


def _identity(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


def _reduce(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    group.all_reduce(out).wait()
    return out


def _chunk(x: Tensor, group: Group) -> Tensor:
    check_sequence(x.shape[0], group)
    n = x.shape[0] // group.size
    return x[group.rank * n : (group.rank + 1) * n].clone()


def _gather(x: Tensor, group: Group) -> Tensor:
    out, work = start_gather(x, group)
    work.wait()
    return out


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    out, work = start_reduce_scatter(x, group)
    work.wait()
    return out


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: Map, adjoint: Map) -> Tensor:
        ctx.group, ctx.adjoint = group, adjoint
        return forward(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.adjoint(grad, ctx.group), None, None, None


def _apply(x: Tensor, group: Group, forward: Map, adjoint: Map) -> Tensor:
    if group.size == 1:
        return x
    out: Tensor = _LinearMap.apply(x, group, forward, adjoint)  # type: ignore[no-untyped-call]
    return out


def copy_to_tp(x: Tensor, group: Group) -> Tensor:
    """Any shape; a replicated tensor that enters rank-dependent work."""
    return _apply(x, group, _identity, _reduce)


def reduce_from_tp(x: Tensor, group: Group) -> Tensor:
    """Any shape; the sum over ranks, replicated."""
    return _apply(x, group, _reduce, _identity)


def scatter_to_sequence(x: Tensor, group: Group) -> Tensor:
    """``[s, ...]`` replicated -> ``[s / size, ...]``."""
    return _apply(x, group, _chunk, _gather)


def gather_from_sequence(x: Tensor, group: Group) -> Tensor:
    """``[s / size, ...]`` -> ``[s, ...]`` that enters rank-dependent work."""
    return _apply(x, group, _gather, _reduce_scatter)


def reduce_scatter_to_sequence(x: Tensor, group: Group) -> Tensor:
    """``[s, ...]`` terms of a sum -> this rank's ``[s / size, ...]`` of the sum."""
    return _apply(x, group, _reduce_scatter, _gather)


def unscatter_from_sequence(x: Tensor, group: Group) -> Tensor:
    """``[s / size, ...]`` -> ``[s, ...]`` replicated."""
    return _apply(x, group, _gather, _chunk)
