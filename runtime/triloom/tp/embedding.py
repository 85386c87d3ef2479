"""Token embedding with the vocabulary split over a tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..groups.base import Group
from ..scope import GradWriter, Scope
from ..shards import ShardSpec, split_even
from .comm import start_gather, start_reduce_scatter
from .vocab import check_ids
from .weights import Init, hand_over, parameter


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding ``[vocab, hidden]`` split over tp, as evenly as they go; a shard may be empty.

    name: global name of the layer, the key of its initial weights. std: deviation of the initial weights.
    """

    def __init__(self, vocab: int, hidden: int, *, scope: Scope, name: str, std: float = 0.02) -> None:
        super().__init__()
        if vocab < 1 or hidden < 1:
            raise ConfigError(f"{name}: an embedding needs positive sizes, got vocab={vocab}, hidden={hidden}")
        self.vocab, self.scope = vocab, scope
        self.sequence = scope.sequence_parallel and scope.tp.size > 1
        self.held = split_even(vocab, scope.tp.size)[scope.tp.rank]
        spec = ShardSpec((vocab, hidden), 0, (self.held,))
        self.shards = {"weight": spec}
        self.weight = parameter(scope, f"{name}.weight", spec, Init(std=std))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64, whole and equal on every rank of tp.

        ``[b, s]`` gives ``[b, s, h]``; with sequence parallelism ids are ``[s, b]`` and the result is
        this rank's ``[s / tp, b, h]``. Raises ConfigError for an id outside the vocabulary.
        """
        check_ids(ids, self.vocab, "token id", self.scope.tp)
        out: Tensor = _Embedding.apply(  # type: ignore[no-untyped-call]
            ids, self.weight, self.scope.grads, self.scope.tp, self.sequence, self.held[0]
        )
        return out

    def extra_repr(self) -> str:
        return f"vocab={self.vocab}, held={self.held[0]}..{self.held[1]}, tp={self.scope.tp.size}"


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, sink: Any, group: Group, sequence: bool, start: int) -> Tensor:
        ctx.param, ctx.sink, ctx.group, ctx.sequence = weight, sink, group, sequence
        local, missing = _localised(ids, start, weight.shape[0], group)
        ctx.save_for_backward(local, missing)
        out = F.embedding(local, weight) if weight.shape[0] else weight.new_zeros(*ids.shape, weight.shape[1])
        if missing is None:
            return out
        out.masked_fill_(missing.unsqueeze(-1), 0)
        if sequence:
            out, work = start_reduce_scatter(out, group)
        else:
            work = group.all_reduce(out)
        work.wait()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, None, None, None]:
        local, missing = ctx.saved_tensors
        if ctx.sequence:
            grad, work = start_gather(grad, ctx.group)
            work.wait()
        rows = grad.reshape(-1, grad.shape[-1])
        write = _rows_writer(rows, local.reshape(-1), None if missing is None else missing.reshape(-1, 1))
        return None, hand_over(ctx.sink, ctx.param, write), None, None, None, None


def _localised(ids: Tensor, start: int, count: int, group: Group) -> tuple[Tensor, Tensor | None]:
    """Rows of the local shard, and which ids it does not hold (their row is 0); None where it holds all."""
    if group.size == 1:
        return ids, None
    local = ids - start
    missing = (local < 0) | (local >= count)
    return local.masked_fill_(missing, 0), missing


def _rows_writer(grad: Tensor, rows: Tensor, missing: Tensor | None) -> GradWriter:
    """Writer of the rows of ``grad`` ``[n, h]`` added up at ``rows`` ``[n]``, in order; missing: ``[n, 1]``."""

    def write(out: Tensor, accumulate: bool) -> None:
        if not accumulate:
            out.zero_()
        if out.shape[0] == 0:
            return
        terms = grad if missing is None else grad.masked_fill(missing, 0)
        out.index_add_(0, rows, terms.to(out.dtype))

    return write
