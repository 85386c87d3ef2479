"""Which tokens a step trains on: a pure function of (seed, step, sample), whatever the mesh."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError
from .corpus import Bytes, Corpus
from .order import keys, permute

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Windows:
    """A stretch of tokens cut into windows of ``seq`` inputs with their next tokens.

    Every window is seen once per epoch, in an order drawn for the epoch; each epoch cuts at another
    offset. Sample i belongs to epoch ``i // count``.
    """

    tokens: Bytes
    seq: int
    seed: int
    shuffle: bool = True

    @property
    def count(self) -> int:
        """Windows per epoch: as many as fit at every offset."""
        spare = self.seq if self.shuffle else 1
        return (len(self.tokens) - spare) // self.seq

    def starts(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each sample, by global sample index."""
        if not self.shuffle:
            return (samples % self.count) * self.seq
        out = np.empty_like(samples)
        for epoch in np.unique(samples // self.count):
            mine = samples // self.count == epoch
            offset = int(keys(self.seed, int(epoch), 1)[0] % np.uint64(self.seq))
            out[mine] = offset + self.seq * permute(samples[mine] % self.count, self.count, self.seed, int(epoch))
        return out

    def take(self, first: int, count: int) -> Batch:
        """Samples ``first`` to ``first + count``: inputs and targets, int64 [count, seq] each."""
        starts = self.starts(np.arange(first, first + count, dtype=np.int64))
        windows = self.tokens[starts[:, None] + np.arange(self.seq + 1)]
        tokens = torch.from_numpy(windows.astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def batch(self, step: int, size: int, dp: int = 1, dp_rank: int = 0) -> Batch:
        """What dp rank ``dp_rank`` of ``dp`` trains on at ``step``, of ``size`` samples over all."""
        if size % dp:
            raise ConfigError(f"a batch of {size} samples cannot be split evenly over dp={dp}")
        share = size // dp
        return self.take(step * size + dp_rank * share, share)


@dataclass(frozen=True)
class Split:
    """Training and held-out windows of one corpus; ``held_out`` is None where none was asked for."""

    train: Windows
    held_out: Windows | None


def split(corpus: Corpus, *, seq: int, seed: int, held_out: float) -> Split:
    """Cut ``held_out`` (a fraction) off the end of the corpus.

    Raises ConfigError if either part holds no window.
    """
    total = len(corpus.tokens)
    cut = total - int(total * held_out)
    train = Windows(corpus.tokens[:cut], seq, seed)
    if train.count < 1:
        raise ConfigError(
            f"the training text has {cut} tokens, fewer than the {2 * seq} that model.seq = {seq} needs; "
            "lower model.seq or give more text (data.path)"
        )
    if held_out == 0:
        return Split(train, None)
    evaluation = Windows(corpus.tokens[cut:], seq, seed, shuffle=False)
    if evaluation.count < 1:
        raise ConfigError(
            f"data.held_out = {held_out:g} of {total} tokens leaves {total - cut}, fewer than the {seq + 1} that one "
            f"sample of model.seq = {seq} needs; raise it, or set it to 0 together with train.eval_batches = 0"
        )
    return Split(train, evaluation)
