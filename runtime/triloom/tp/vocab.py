"""The vocabulary split over a group: range check of ids, and logits made whole for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from ..groups.base import Group
from ..shadow import shadow
from ..shards import split_even


def gather_vocab(logits: Tensor, vocab: int, group: Group) -> Tensor:
    """``[..., local vocab]`` of every rank, split by :func:`split_even`, as ``[..., vocab]``; not differentiable."""
    if group.size == 1:
        return logits
    shards = split_even(vocab, group.size)
    lead, widest = logits.shape[:-1], shards[0][1]
    mine = logits.new_zeros(*lead, widest)
    mine[..., : logits.shape[-1]] = logits.detach()
    every = mine.new_empty(group.size, *mine.shape)
    group.all_gather(every, mine).wait()
    return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(every, shards, strict=True)], -1)


def check_ids(ids: Tensor, vocab: int, what: str, group: Group, ignore: int | None = None) -> None:
    """Raise ConfigError naming the first id outside ``[0, vocab)``; on a GPU an asynchronous device assertion.

    A shard cannot tell an id that another shard holds from nonsense, so it is asked before.
    """
    if ids.is_cuda:
        torch._assert_async(_good(ids, vocab, ignore).all(), f"{what} outside [0, {vocab})")
        return
    if ids.numel() == 0 or ids.is_meta or shadow(ids):
        return
    low, high = torch.aminmax(ids)
    if high < vocab and (low >= 0 or (ignore is not None and bool(_good(ids, vocab, ignore).all()))):
        return
    value = int(ids[~_good(ids, vocab, ignore)][0])
    allowed = "" if ignore is None else f" or {ignore} (ignored)"
    raise ConfigError(
        f"{what} {value} on rank {group.rank} of {group.name!r} is outside the vocabulary: "
        f"allowed are 0..{vocab - 1}{allowed}"
    )


def _good(ids: Tensor, vocab: int, ignore: int | None) -> Tensor:
    good = (ids >= 0) & (ids < vocab)
    return good if ignore is None else good | (ids == ignore)
