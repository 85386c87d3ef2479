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
    Returns ``(largest, log_top)``, each ``[n]``: m_k and -log Z_k, the log of the largest probability;
    (-inf, 0) for an empty or guarded row.
    """
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf), logits.new_zeros(logits.shape[:1])
    largest = logits.amax(-1)
    torch.softmax(logits, -1, out=out)
    if guard:
        nothing = largest == -torch.inf
        out.masked_fill_(nothing.unsqueeze(1), 0)
        return largest, out.amax(-1).log_().masked_fill_(nothing, 0)
    return largest, out.amax(-1).log_()


def target_logits(logits: Tensor, index: Tensor) -> Tensor:
    """Logit of each row at ``index`` ``[n, 1]``; zeros of an empty shard. Returns ``[n]``."""
    if logits.shape[-1] == 0:
        return logits.new_zeros(logits.shape[:1])
    return logits.gather(1, index).squeeze(1)


def combine_shards(largest: Tensor, log_top: Tensor) -> tuple[Tensor, Tensor]:
    """m and -log Z of each row from those of the shards. largest, log_top: ``[shards, n]``; returns two ``[n]``."""
    m = largest.amax(0)
    return m, (largest - m).sub_(log_top).exp_().sum(0).log_().neg_()


def shard_gradient_(softmax: Tensor, scale: Tensor, index: Tensor, taken: Tensor) -> Tensor:
    """Gradient of the logits, in place of the shard's softmax.

    softmax: ``[n, v]``; scale: ``[n]``, the factor of a row; taken: ``[n]``, what to take off at ``index`` ``[n, 1]``.
    """
    softmax.mul_(scale.unsqueeze(1))
    return softmax.scatter_add_(1, index, taken.neg().unsqueeze(1)) if softmax.shape[-1] else softmax
