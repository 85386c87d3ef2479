"""Cross-entropy over one shard of the vocabulary: the parts between the communication.

For logits x of a row, its largest m and target t, over shards k that hold a part of the vocabulary:

    m = max_k m_k        Z = sum_k exp(m_k - m) Z_k,  Z_k = sum_{j in k} exp(x_j - m_k)
    loss = (m - x_t) + log Z        dloss/dx_j = softmax_k(x)_j * exp(m_k - m) Z_k / Z - [j = t]

The shard's softmax is taken at once, in place: its largest probability is 1 / Z_k, so that no second
pass over exponentials is made. Combining shards by their largest and their sum: Milakov and Gimelshein,
"Online normalizer calculation for softmax", arXiv 1805.02867, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100


def shard_softmax(logits: Tensor, out: Tensor, *, guard: bool) -> tuple[Tensor, Tensor]:
    """Softmax over the shard, and what the other shards must know of it.

    logits: ``[n, v]``, v may be 0; out: ``[n, v]``, may be logits itself; guard: rows that are -inf throughout
    become zeros (a shard of a larger vocabulary) rather than nan (the whole of it).
    Returns ``(largest, log_sum)``, each ``[n]``: m_k and log Z_k, (-inf, 0) for an empty or guarded row.
    """
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf), logits.new_zeros(logits.shape[:1])
    largest = logits.amax(-1)
    torch.softmax(logits, -1, out=out)
    if guard:
        out.masked_fill_((largest == -torch.inf).unsqueeze(1), 0)
    log_sum = out.amax(-1).log_().neg_()
    if guard:
        log_sum.masked_fill_(largest == -torch.inf, 0)
    return largest, log_sum


def target_logits(logits: Tensor, index: Tensor, held: Tensor) -> Tensor:
    """Logit of each row's target, 0 where the shard does not hold it. index: ``[n]``, valid wherever held."""
    if logits.shape[-1] == 0:
        return logits.new_zeros(logits.shape[:1])
    return logits.gather(-1, index.unsqueeze(1)).squeeze(1).masked_fill_(~held, 0)


def combine_shards(largest: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """m and log Z of each row from those of the shards. largest, log_sum: ``[shards, n]``; returns two ``[n]``."""
    m = largest.amax(0)
    return m, (largest - m).add_(log_sum).exp_().sum(0).log_()


def shard_gradient_(softmax: Tensor, scale: Tensor, target: Tensor, index: Tensor) -> Tensor:
    """Gradient of the logits, in place of the shard's softmax.

    softmax: ``[n, v]``; scale: ``[n]``, the factor of a row; target: ``[n]``, what to take off at ``index``.
    """
    softmax.mul_(scale.unsqueeze(1))
    if softmax.shape[-1]:
        rows = torch.arange(0, softmax.numel(), softmax.shape[-1], device=softmax.device)
        softmax.view(-1).index_add_(0, rows.add_(index), target, alpha=-1)
    return softmax
