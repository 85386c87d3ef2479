"""Linear layers split over a tensor-parallel group.

A column-parallel layer holds rows of the weight (a slice of the outputs), a row-parallel layer holds
columns (a slice of the inputs); a pair of them needs one reduction in each direction. Shoeybi et al.,
"Megatron-LM", arXiv 1909.08053, section 3; with sequence parallelism Korthikanti et al., arXiv 2205.05198,
section 4.2.2: activations between the pairs are split along the sequence (dim 0), the reduction becomes a
reduce_scatter and its adjoint an all_gather.

Each autograd function hands the weight gradient as a closure to the sink that was current at its
forward. What communication there is runs while the closure does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, TriloomError
from ..groups.base import Group, Work
from ..mesh import check_divides
from ..scope import GradWriter, Scope, WeightGrads
from ..shards import ShardSpec
from .comm import start_gather, start_reduce_scatter
from .weights import Init, even_slices, hand_over, parameter, product_writer, row_sum_writer, runs_at_once

Grads = tuple[Tensor | None, Tensor | None, Tensor | None, None, None]


class Wires(NamedTuple):
    """What a layer's autograd function needs besides its tensors; fixed when the layer is built."""

    group: Group
    sequence: bool


def linear(x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, sink: WeightGrads | None) -> Tensor:
    """``x weight^T + bias`` on one rank; the gradients of weight and bias go to ``sink`` if there is one.

    x: ``[..., in]``; weight: ``[out, in]``; bias: ``[out]``; returns ``[..., out]``.
    """
    out: Tensor = _Linear.apply(x, weight, bias, sink, None)  # type: ignore[no-untyped-call]
    return out


def _rows(x: Tensor) -> Tensor:
    """``[..., n]`` as a matrix; a view of a contiguous tensor."""
    return x.view(-1, x.shape[-1])


def _save(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: WeightGrads | None, wires: Any) -> Tensor:
    """Keep what the backward needs; returns x, contiguous. The parameters themselves name the gradient to the sink."""
    if not x.is_contiguous():
        x = x.contiguous()
    ctx.save_for_backward(x if weight.requires_grad else None, weight)
    ctx.weight, ctx.bias, ctx.sink, ctx.wires = weight, bias, sink, wires
    return x


def _load(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(x, weight, grad)``, contiguous. Closures hide weight gradients from a graph of the backward.

    x is detached: a deferred closure must neither hold the graph nor care about the grad mode it runs in.
    """
    if torch.is_grad_enabled():
        raise TriloomError("tensor-parallel layers cannot be differentiated twice (create_graph=True)")
    x, weight = ctx.saved_tensors
    return None if x is None else x.detach(), weight, grad if grad.is_contiguous() else grad.contiguous()


def _hand_over(ctx: Any, write: GradWriter | None, bias_grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias that autograd gets: None for those the sink takes."""
    dweight = dbias = None
    if write is not None:
        dweight = hand_over(ctx.sink, ctx.weight, write)
    if ctx.bias is not None and ctx.bias.requires_grad:
        dbias = hand_over(ctx.sink, ctx.bias, row_sum_writer(_rows(bias_grad)))
    return dweight, dbias


class _Linear(torch.autograd.Function):
    """One rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Any, wires: Any) -> Tensor:
        x = _save(ctx, x, weight, bias, sink, wires)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight, grad = _load(ctx, grad)
        dx = torch.matmul(grad, weight) if ctx.needs_input_grad[0] else None
        write = None if x is None else product_writer(_rows(grad), _rows(x))
        return dx, *_hand_over(ctx, write, grad), None, None


class _ColumnLinear(torch.autograd.Function):
    """Backward: the reduction of dX is under way while the weight gradient is computed.

    With sequence parallelism only this rank's part of the input is kept; the writer of the weight
    gradient gathers it again, before the dX product when it is known to run at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Any, wires: Wires) -> Tensor:
        x = _save(ctx, x, weight, bias, sink, wires)
        return F.linear(_gathered(start_gather(x, wires.group)) if wires.sequence else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight, grad = _load(ctx, grad)
        group, sequence = ctx.wires
        write = None
        if x is not None:
            early = start_gather(x, group) if sequence and runs_at_once(ctx.sink) else None
            write = _gathering_writer(grad, x, group, early) if sequence else product_writer(_rows(grad), _rows(x))
        dx, work = None, None
        if ctx.needs_input_grad[0]:
            dx, work = _reduced(torch.matmul(grad, weight), group, sequence)
        weight_grads = _hand_over(ctx, write, grad)
        if work is not None:
            work.wait()
        return dx, *weight_grads, None, None


def _gathered(started: tuple[Tensor, Work]) -> Tensor:
    out, work = started
    work.wait()
    return out


def _reduced(x: Tensor, group: Group, sequence: bool) -> tuple[Tensor, Work]:
    """The sum over ranks, whole or this rank's part of the sequence, when the Work is done."""
    return start_reduce_scatter(x, group) if sequence else (x, group.all_reduce(x))


def _gathering_writer(grad: Tensor, x: Tensor, group: Group, early: tuple[Tensor, Work] | None) -> GradWriter:
    """Writer of ``grad^T gather(x)``; ``early``: the gather, if it was started already."""

    def write(out: Tensor, accumulate: bool) -> None:
        full = _gathered(early or start_gather(x, group))
        product_writer(_rows(grad), _rows(full))(out, accumulate)

    return write


class _RowLinear(torch.autograd.Function):
    """The bias is added once, after the reduction.

    With sequence parallelism the gradient of the bias is this rank's term of a sum over the group.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sink: Any, wires: Wires) -> Tensor:
        x = _save(ctx, x, weight, bias, sink, wires)
        out, work = _reduced(F.linear(x, weight), wires.group, wires.sequence)
        work.wait()
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, weight, grad = _load(ctx, grad)
        full = _gathered(start_gather(grad, ctx.wires.group)) if ctx.wires.sequence else grad
        dx = torch.matmul(full, weight) if ctx.needs_input_grad[0] else None
        write = None if x is None else product_writer(_rows(full), _rows(x))
        return dx, *_hand_over(ctx, write, grad), None, None


class _ParallelLinear(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter | None
    shards: dict[str, ShardSpec]

    def __init__(
        self, in_features: int, out_features: int, scope: Scope, parallel: type[torch.autograd.Function]
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ConfigError(f"a linear layer needs positive sizes, got in={in_features}, out={out_features}")
        self.in_features, self.out_features, self.scope = in_features, out_features, scope
        self.sequence = scope.sequence_parallel and scope.tp.size > 1
        self._wires = Wires(scope.tp, self.sequence)
        self._function = _Linear.apply if scope.tp.size == 1 else parallel.apply

    def _fill(self, name: str, weight: ShardSpec, bias: ShardSpec | None, init: Init) -> None:
        self.shards = {"weight": weight} | ({"bias": bias} if bias else {})
        self.weight = parameter(self.scope, f"{name}.weight", weight, init)
        self.bias = parameter(self.scope, f"{name}.bias", bias, Init()) if bias else None

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, tp={self.scope.tp.size}"


class ColumnParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the outputs split over tp.

    in_features, out_features: sizes of the whole layer. name: global name of the layer, the key of its
    initial weights. parts: sizes of the projections fused in the outputs (queries, keys, values; gate, up);
    each is split over tp by itself, and the whole weight is their concatenation. uneven: parts need not be
    divisible by tp (a vocabulary). std: deviation of the initial weights; the bias starts at 0.
    Raises MeshError where tp does not divide a part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scope: Scope,
        name: str,
        bias: bool = True,
        parts: tuple[int, ...] | None = None,
        uneven: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__(in_features, out_features, scope, _ColumnLinear)
        parts = parts or (out_features,)
        if sum(parts) != out_features:
            raise ConfigError(f"{name}: parts {parts} sum to {sum(parts)}, not to out_features={out_features}")
        for part in () if uneven else parts:
            check_divides(f"outputs of {name}", part, "tp", scope.tp.size)
        slices = even_slices(parts, scope.tp.rank, scope.tp.size)
        spec = ShardSpec((out_features, in_features), 0, slices)
        self._fill(name, spec, ShardSpec((out_features,), 0, slices) if bias else None, Init(std=std))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[..., in]``, with sequence parallelism ``[s / tp, ..., in]``; returns ``[..., local out]``, s whole."""
        out: Tensor = self._function(x, self.weight, self.bias, self.scope.grads, self._wires)  # type: ignore[no-untyped-call]
        return out


class RowParallelLinear(_ParallelLinear):
    """``y = x W^T + b`` with the inputs split over tp.

    Arguments as for ColumnParallelLinear. Raises MeshError where tp does not divide the inputs.
    """

    def __init__(
        self, in_features: int, out_features: int, *, scope: Scope, name: str, bias: bool = True, std: float = 0.02
    ) -> None:
        super().__init__(in_features, out_features, scope, _RowLinear)
        check_divides(f"inputs of {name}", in_features, "tp", scope.tp.size)
        slices = even_slices((in_features,), scope.tp.rank, scope.tp.size)
        spec = ShardSpec((out_features, in_features), 1, slices)
        whole = ShardSpec((out_features,), partial_grad=self.sequence)
        self._fill(name, spec, whole if bias else None, Init(std=std))

    def forward(self, x: Tensor) -> Tensor:
        """x: ``[..., local in]``; returns ``[..., out]``, with sequence parallelism ``[s / tp, ..., out]``."""
        out: Tensor = self._function(x, self.weight, self.bias, self.scope.grads, self._wires)  # type: ignore[no-untyped-call]
        return out
