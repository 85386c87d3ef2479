"""Cross-entropy: over one shard of the vocabulary, the parts between the communication; and put together.

For logits x of a row, its largest m and target t, over shards k that hold a part of the vocabulary:

    m = max_k m_k        Z = sum_k exp(m_k - m) Z_k,  Z_k = sum_{j in k} exp(x_j - m_k)
    loss = (m - x_t) + log Z        dloss/dx_j = softmax_k(x)_j * exp(m_k - m) Z_k / Z - [j = t]

With label smoothing e and a z-loss c over a vocabulary of V, L = m + log Z:

    loss = (1 - e) (L - x_t) + e (L - sum_j x_j / V) + c L^2
    dloss/dx_j = softmax(x)_j (1 + 2 c L) - e / V - (1 - e) [j = t]

The eager parts take the shard's softmax at once, in place: its largest probability is 1 / Z_k, so that no second
pass over exponentials is made. Combining shards by their largest and their sum: Milakov and Gimelshein,
"Online normalizer calculation for softmax", arXiv 1805.02867, section 3.1. z-loss: Chowdhery et al., "PaLM", arXiv
2204.02311, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100

Gather = Callable[[Tensor], Tensor]
"""``[k, n]`` of this shard -> ``[shards, k, n]`` of all."""


@dataclass(frozen=True)
class Terms:
    """What is added to the plain cross-entropy."""

    smoothing: float = 0.0
    """Probability that the target gives away to the whole vocabulary, itself included; in [0, 1)."""
    z_loss: float = 0.0
    """Factor of the squared log-sum, which keeps it near 0."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"label smoothing must be in [0, 1), got {self.smoothing}")
        if not 0.0 <= self.z_loss < float("inf"):
            raise ValueError(f"z_loss must be at least 0 and finite, got {self.z_loss}")


PLAIN = Terms()


class Statistics(NamedTuple):
    """Of each row of a shard, ``[n]`` in the computing dtype."""

    largest: Tensor
    """m_k; -inf where there is nothing."""
    log_top: Tensor
    """-log Z_k; 0 where there is nothing."""
    target: Tensor
    """The target's logit; anything finite or not where the target is held elsewhere."""
    total: Tensor | None
    """Sum of the logits."""
    kept: tuple[Tensor, ...]
    """What the gradient needs of the logits."""


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


def shard_statistics(
    logits: Tensor, local: Tensor, *, whole: bool, in_place: bool, with_total: bool = False
) -> Statistics:
    """What the other shards must know, and what the gradient needs.

    logits: ``[n, v]``, v may be 0, 16-bit ones computed in fp32; local: ``[n]`` int64, the target's place in this shard
    or -1; whole: the shard is the vocabulary, so that a row of -inf is nan; in_place: the logits may be used up;
    with_total: sum the logits too.
    """
    wide = logits.float() if logits.element_size() < 4 else logits
    target = target_logits(wide, local.clamp(min=0).unsqueeze(1))
    total = wide.sum(-1) if with_total else None
    softmax = torch.empty_like(wide) if wide is logits and not in_place else wide
    largest, log_top = shard_softmax(wide, softmax, guard=not whole)
    return Statistics(largest, log_top, target, total, (softmax,))


def shard_gradient(
    kept: tuple[Tensor, ...],
    local: Tensor,
    scale: Tensor,
    taken: Tensor,
    uniform: Tensor | None,
    *,
    dtype: torch.dtype,
    in_place: bool,
) -> Tensor:
    """``softmax_k * scale - uniform - [j = local] taken``, ``[n, v]`` in ``dtype``; rows' factors are ``[n]``.

    kept: of :func:`shard_statistics`, which was given the same in_place; it is used up. taken: 0 where local is -1.
    """
    (softmax,) = kept
    grad = shard_gradient_(softmax, scale, local.clamp(min=0).unsqueeze(1), taken)
    return (grad if uniform is None else grad.sub_(uniform.unsqueeze(1))).to(dtype)


def whole_loss_and_gradient(logits: Tensor, local: Tensor, ignored: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """``(losses [n], gradient [n, v])`` over the whole vocabulary; rows that are ``ignored`` ``[n]`` (bool) have zeros.

    logits: ``[n, v]``, used up; the gradient has their dtype, and their memory where that can be.
    """
    made = shard_statistics(logits, local, whole=True, in_place=True, with_total=terms.smoothing != 0)
    losses, lse = row_losses(made, terms, logits.shape[-1])
    scale = torch.ones_like(losses).masked_fill_(ignored, 0)
    grad = shard_gradient(
        made.kept, local, *row_factors(scale, None, local < 0, lse, terms, logits.shape[-1]),
        dtype=logits.dtype, in_place=True,
    )  # fmt: skip
    return losses.masked_fill_(ignored, 0), grad


@dataclass(frozen=True)
class Parts:
    """The three functions that touch logits, eager or by kernels."""

    statistics: Callable[..., Statistics] = shard_statistics
    gradient: Callable[..., Tensor] = shard_gradient
    both: Callable[..., tuple[Tensor, Tensor]] = whole_loss_and_gradient


EAGER_PARTS = Parts()


def row_losses(made: Statistics, terms: Terms, vocab: int) -> tuple[Tensor, Tensor | None]:
    """``(losses, L)`` of rows whose statistics cover the whole vocabulary; L only if a z-loss asks for it.

    Uses up ``largest``.
    """
    largest, log_top, target, total, _ = made
    lse = largest - log_top if terms.z_loss else None
    losses = largest.sub_(target).sub_(log_top)
    if total is not None:
        losses.add_((target - total / vocab).mul_(terms.smoothing))
    if lse is not None:
        losses.addcmul_(lse, lse, value=terms.z_loss)
    return losses, lse


def row_factors(
    scale: Tensor, share: Tensor | None, foreign: Tensor, lse: Tensor | None, terms: Terms, vocab: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(scale, taken, uniform)`` for :func:`shard_gradient`.

    scale: ``[n]``, the gradient of each row's loss; share: this shard's part of the row's sum, None for all of it;
    foreign: rows whose target is not in this shard.
    """
    taken = scale if share is None else scale.masked_fill(foreign, 0)
    uniform = scale * (terms.smoothing / vocab) if terms.smoothing else None
    factor = scale if share is None else scale * share
    if lse is not None:
        factor = factor * (1 + 2 * terms.z_loss * lse)
    return factor, taken * (1 - terms.smoothing) if terms.smoothing else taken, uniform


def gathered(made: Statistics, foreign: Tensor, gather: Gather) -> tuple[Statistics, Tensor]:
    """The statistics of the whole vocabulary, and this shard's share ``[n]`` of each row's sum."""
    largest, log_top, target, total, kept = made
    target = target.masked_fill(foreign, 0)
    shards = gather(torch.stack((largest, log_top, target) if total is None else (largest, log_top, target, total)))
    m, minus_log_z = combine_shards(shards[:, 0], shards[:, 1])
    share = (largest - m).sub_(log_top).add_(minus_log_z).exp_()
    return Statistics(m, minus_log_z, shards[:, 2].sum(0), None if total is None else shards[:, 3].sum(0), kept), share


class UsedUpError(RuntimeError):
    """A second backward through a loss whose memory holds the gradient of the first."""


class CrossEntropy(torch.autograd.Function):
    """Sum of the losses. One pass over the logits forward, one backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        local: Tensor,
        ignored: Tensor,
        vocab: int,
        gather: Gather | None,
        terms: Terms,
        parts: Parts,
        in_place: bool,
    ) -> Tensor:
        given = logits.detach().reshape(local.numel(), logits.shape[-1])
        in_place = in_place or given.data_ptr() != logits.data_ptr()
        made = parts.statistics(given, local, whole=gather is None, in_place=in_place, with_total=terms.smoothing != 0)
        foreign, share = local < 0, None
        if gather is not None:
            made, share = gathered(made, foreign, gather)
        losses, lse = row_losses(made, terms, vocab)
        ctx.save_for_backward(local, ignored, foreign, share, lse, *made.kept)
        ctx.settings = vocab, terms, parts, in_place
        ctx.used, ctx.like = False, (logits.shape, logits.dtype)
        return losses.masked_fill_(ignored, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.used:
            raise UsedUpError(
                "the cross-entropy's memory already holds the gradient of an earlier backward; "
                "run the forward again instead of a second backward"
            )
        ctx.used = True
        local, ignored, foreign, share, lse, *kept = ctx.saved_tensors
        vocab, terms, parts, in_place = ctx.settings
        scale = grad.expand(ignored.shape).masked_fill(ignored, 0)
        factors = row_factors(scale, share, foreign, lse, terms, vocab)
        shape, dtype = ctx.like
        dlogits = parts.gradient(tuple(kept), local, *factors, dtype=dtype, in_place=in_place)
        return dlogits.view(shape), *(None,) * 7


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    terms: Terms = PLAIN,
    parts: Parts = EAGER_PARTS,
    in_place: bool = False,
) -> Tensor:
    """Sum of the losses of all targets but ``ignore_index``, 0-dim in the computing dtype.

    logits: ``[..., vocab]``; targets: ``[...]`` int64 in ``[0, vocab)``, unchecked; parts: :data:`EAGER_PARTS` or
    those of the kernels; in_place: the logits are used up, their memory becomes their gradient. A second backward
    raises UsedUpError.
    """
    index = targets.reshape(-1)
    ignored = index == ignore_index
    loss: Tensor = CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, index.masked_fill(ignored, -1), ignored, logits.shape[-1], None, terms, parts, in_place
    )
    return loss
