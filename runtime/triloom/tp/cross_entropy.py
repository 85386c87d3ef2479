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
        given = logits.detach().reshape(targets.numel(), logits.shape[-1])
        wide = given.float() if given.element_size() < 4 else given
        index = targets.reshape(-1)
        ignored = index == ignore
        foreign = ignored if group.size == 1 else ignored | (index < held[0]) | (index >= held[1])
        index = (index - held[0]).masked_fill_(foreign, 0).unsqueeze(1)
        target = target_logits(wide, index)
        softmax = torch.empty_like(wide) if wide.data_ptr() == logits.data_ptr() and not in_place else wide
        largest, log_top = shard_softmax(wide, softmax, guard=group.size > 1)
        share = None
        if group.size > 1:
            largest, log_top, target, share = _combine(largest, log_top, target.masked_fill_(foreign, 0), group)
        ctx.save_for_backward(softmax, index, ignored, foreign, share)
        ctx.used, ctx.like = False, (logits.shape, logits.dtype)
        return largest.sub_(target).sub_(log_top).masked_fill_(ignored, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if ctx.used:
            raise TriloomError(
                "the cross-entropy's memory already holds the gradient of an earlier backward; "
                "run the forward again instead of a second backward"
            )
        ctx.used = True
        softmax, index, ignored, foreign, share = ctx.saved_tensors
        scale = grad.expand(ignored.shape).masked_fill(ignored, 0)
        taken = scale if share is None else scale.masked_fill(foreign, 0)
        dlogits = shard_gradient_(softmax, scale if share is None else scale * share, index, taken)
        shape, dtype = ctx.like
        return dlogits.view(shape).to(dtype), None, None, None, None, None


def _combine(largest: Tensor, log_top: Tensor, target: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, -log Z and target's logit of each row over all shards, and this shard's share of the row's sum."""
    mine = torch.stack((largest, log_top, target))
    shards = mine.new_empty(group.size, *mine.shape)
    group.all_gather(shards, mine).wait()
    m, minus_log_z = combine_shards(shards[:, 0], shards[:, 1])
    share = (largest - m).sub_(log_top).add_(minus_log_z).exp_()
    return m, minus_log_z, shards[:, 2].sum(0), share
