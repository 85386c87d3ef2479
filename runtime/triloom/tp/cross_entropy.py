"""Cross-entropy over logits whose vocabulary is split over a tensor-parallel group.

The logits are never gathered: three numbers per token and rank (largest logit, log of the sum of
exponentials, target's logit) are, in one all_gather. The arithmetic is in
:mod:`triloom_kernels.cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triloom_kernels.cross_entropy import (
    IGNORE_INDEX,
    combine_shards,
    shard_gradient_,
    shard_softmax,
    target_logits,
)

from ..errors import TriloomError
from ..groups.base import Group
from ..shards import split_even
from .vocab import check_ids


def loss_weight(targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Number of targets that count, as a 0-dim fp64 tensor."""
    return (targets != ignore_index).sum(dtype=torch.float64)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group,
    vocab: int,
    ignore_index: int = IGNORE_INDEX,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, number of targets that count)``, the same on every rank of the group.

    logits: ``[..., local vocab]``, this rank's share of ``vocab`` by :func:`split_even`, which may be
    empty; targets: ``[...]`` int64, global ids, equal on every rank. in_place: the logits are used up
    (their memory holds the softmax and then the gradient) and a second backward raises.
    16-bit logits are computed in fp32. Raises ConfigError for a target outside the vocabulary.
    """
    check_ids(targets, vocab, "target", group, ignore_index)
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, targets, group, split_even(vocab, group.size)[group.rank], ignore_index, in_place
    )
    return loss, loss_weight(targets, ignore_index)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: Group, held: tuple[int, int], ignore: int, in_place: bool
    ) -> Tensor:
        flat, index = logits.detach().reshape(targets.numel(), logits.shape[-1]), targets.reshape(-1)
        valid = index != ignore
        mine = valid & (index >= held[0]) & (index < held[1]) if group.size > 1 else valid
        index = (index - held[0]).masked_fill_(~mine, 0)
        work = flat.float() if flat.element_size() < 4 else flat
        target = target_logits(work, index, mine)
        softmax = work if in_place or work is not flat else torch.empty_like(work)
        largest, log_sum = shard_softmax(work, softmax, guard=group.size > 1)
        share = None
        if group.size > 1:
            largest, log_sum, target, share = _combine(largest, log_sum, target, group)
        ctx.save_for_backward(softmax, index, valid, mine, share)
        ctx.used = False
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        return (largest - target).add_(log_sum).masked_fill_(~valid, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.used:
            raise TriloomError(
                "the cross-entropy's memory already holds the gradient of an earlier backward; "
                "run the forward again instead of a second backward"
            )
        ctx.used = True
        softmax, index, valid, mine, share = ctx.saved_tensors
        factor = grad * valid
        scale = factor if share is None else factor * share
        dlogits = shard_gradient_(softmax, scale, grad * mine, index)
        return dlogits.view(ctx.shape).to(ctx.dtype), None, None, None, None, None


def _combine(largest: Tensor, log_sum: Tensor, target: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, log Z and target's logit of each row over all shards, and this shard's share of the row's sum."""
    mine = torch.stack((largest, log_sum, target))
    shards = mine.new_empty(group.size, *mine.shape)
    group.all_gather(shards, mine).wait()
    m, log_z = combine_shards(shards[:, 0], shards[:, 1])
    share = (largest - m).add_(log_sum).sub_(log_z).exp_()
    return m, log_z, shards[:, 2].sum(0), share
