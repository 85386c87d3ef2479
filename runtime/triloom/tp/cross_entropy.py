"""Cross-entropy over logits whose vocabulary is split over a tensor-parallel group.

The logits are never gathered: three numbers per token and rank (largest logit, log of the sum of
exponentials, target's logit) are, in one all_gather. The arithmetic is in :mod:`triloom_kernels.cross_entropy`
and, where the projection belongs to it, :mod:`triloom_kernels.fused_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triloom_kernels.cross_entropy import EAGER_PARTS, IGNORE_INDEX, PLAIN, CrossEntropy, Gather, Parts, Terms
from triloom_kernels.fused_loss import CHUNK, Plan, fused_loss
from triloom_kernels.table import Kernels

from ..groups.base import Group
from ..scope import WeightGrads
from ..shards import split_even
from .comm import copy_to_tp, gather_from_sequence
from .vocab import check_ids
from .weights import hand_over


def loss_weight(targets: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Number of targets that count, as a 0-dim fp64 tensor."""
    return (targets != ignore_index).sum(dtype=torch.float64)


def loss_parts(kernels: Kernels, device: torch.device) -> Parts:
    """What the table has for the logits of ``device``."""
    return Parts(*(kernels.pick(f"cross_entropy_{part}", device) for part in ("statistics", "gradient", "both")))


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: Group,
    vocab: int,
    ignore_index: int = IGNORE_INDEX,
    terms: Terms = PLAIN,
    parts: Parts = EAGER_PARTS,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """``(sum of the losses, number of targets that count)``, the same on every rank of the group.

    logits: ``[..., local vocab]``, this rank's share of ``vocab`` by :func:`split_even`, which may be
    empty; targets: ``[...]`` int64, global ids, equal on every rank. terms: label smoothing and z-loss. in_place: the
    logits are used up (their memory becomes the gradient). A second backward raises UsedUpError.
    16-bit logits are computed in fp32. Raises ConfigError for a target outside the vocabulary.
    """
    local, ignored = _held(targets, group, vocab, ignore_index)
    loss: Tensor = CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, local, ignored, vocab, _gather(group), terms, parts, in_place
    )
    return loss, loss_weight(targets, ignore_index)


def vocab_parallel_linear_cross_entropy(
    x: Tensor,
    weight: nn.Parameter,
    targets: Tensor,
    *,
    group: Group,
    vocab: int,
    sequence: bool = False,
    sink: WeightGrads | None = None,
    ignore_index: int = IGNORE_INDEX,
    terms: Terms = PLAIN,
    parts: Parts = EAGER_PARTS,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """As :func:`vocab_parallel_cross_entropy` of ``x weight^T``, whose logits exist for ``chunk`` tokens at a time.

    x: ``[..., h]`` replicated, or ``[s / tp, ..., h]`` with ``sequence``; weight: ``[local vocab, h]``; targets:
    ``[...]`` in the order of the whole x. The gradients are computed in the forward; that of the weight, in fp32 and as
    large as it, is kept until the closure that ``sink`` gets has run. One all_gather a chunk.
    """
    local, ignored = _held(targets, group, vocab, ignore_index)
    x = gather_from_sequence(x, group) if sequence else copy_to_tp(x, group)
    taken = None if sink is None else (lambda write: hand_over(sink, weight, write))
    plan = Plan(vocab, _gather(group), terms, parts, chunk, taken)
    return fused_loss(x, weight, local, ignored, plan), loss_weight(targets, ignore_index)


def _held(targets: Tensor, group: Group, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``(local, ignored)``, each ``[n]``: the place of a target in this rank's shard or -1, and whether none counts."""
    check_ids(targets, vocab, "target", group, ignore_index)
    start, stop = split_even(vocab, group.size)[group.rank]
    index = targets.reshape(-1)
    ignored = index == ignore_index
    foreign = ignored if group.size == 1 else ignored | (index < start) | (index >= stop)
    return (index - start).masked_fill_(foreign, -1), ignored


def _gather(group: Group) -> Gather | None:
    """None where there is nothing to gather."""
    if group.size == 1:
        return None

    def gather(mine: Tensor) -> Tensor:
        shards = mine.new_empty(group.size, *mine.shape)
        group.all_gather(shards, mine).wait()
        return shards

    return gather
