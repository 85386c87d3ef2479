"""Parameters of sharded layers: their initial values, and where their gradients go."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import philox
from ..scope import GradWriter, Scope, WeightGrads
from ..shards import ShardSpec, split_even


@dataclass(frozen=True, kw_only=True)
class Init:
    """How a parameter starts: ``normal`` draws with deviation ``std``; anything else is the constant ``value``."""

    std: float = 0.0
    value: float = 0.0


def parameter(scope: Scope, name: str, spec: ShardSpec, init: Init) -> nn.Parameter:
    """This rank's shard of the parameter of that global name.

    Normal draws are keyed by (seed, name) and the element's index in the whole parameter, so that the
    shards of any mesh are slices of one and the same parameter, which never exists whole.
    """
    shape = list(spec.global_shape)
    if spec.dim is not None:
        shape[spec.dim] = sum(stop - start for start, stop in spec.slices)
    data = torch.empty(shape, dtype=scope.dtype, device=scope.device)
    if init.std:
        philox.fill_shard(data, philox.key(scope.seed, name), spec, init="normal", std=init.std)
    else:
        data.fill_(init.value)
    return nn.Parameter(data)


def even_slices(parts: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, int], ...]:
    """Ranges a rank holds of a dimension made of ``parts``, each of which is split over the ranks by itself."""
    slices, offset = [], 0
    for part in parts:
        start, stop = split_even(part, size)[rank]
        slices.append((offset + start, offset + stop))
        offset += part
    return tuple(slices)


def hand_over(sink: WeightGrads | None, param: nn.Parameter, write: GradWriter) -> Tensor | None:
    """Give a weight gradient to the sink, or, without one, return it to autograd."""
    if sink is not None:
        sink.add(param, write)
        return None
    out = torch.empty_like(param)
    write(out, False)
    return out


def runs_at_once(sink: WeightGrads | None) -> bool:
    """Whether the closures given to ``sink`` run inside ``add`` (then communication can be started for them)."""
    return sink is None or bool(getattr(sink, "immediate", False))


def product_writer(grad: Tensor, x: Tensor) -> GradWriter:
    """Writer of ``grad^T x``. grad: ``[n, out]``; x: ``[n, in]``, the same dtype.

    Without a temporary where ``out`` has their dtype; otherwise the product is added in out's.
    """

    def write(out: Tensor, accumulate: bool) -> None:
        if out.dtype != x.dtype:
            product = torch.mm(grad.t(), x)
            out.add_(product) if accumulate else out.copy_(product)
        elif accumulate:
            out.addmm_(grad.t(), x)
        else:
            torch.mm(grad.t(), x, out=out)

    return write


def row_sum_writer(grad: Tensor) -> GradWriter:
    """Writer of the sum over rows of ``grad`` ``[n, out]``, summed in out's dtype."""

    def write(out: Tensor, accumulate: bool) -> None:
        if accumulate:
            out.add_(grad.sum(0, dtype=out.dtype))
        else:
            torch.sum(grad, 0, dtype=out.dtype, out=out)

    return write
