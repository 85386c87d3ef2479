"""What is trained in the step benches: two sizes of one model, and a batch every contender gets alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from triloom.boot import World

Batch = tuple[torch.Tensor, torch.Tensor]
State = dict[str, torch.Tensor]

LR, BETAS, EPS, DECAY, CLIP = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
MICROBATCHES = 8
"""Of pipelines."""


@dataclass(frozen=True)
class Size:
    """A GPT-2 shape (tied, no dropout) and how it is trained."""

    name: str
    layers: int
    heads: int
    hidden: int
    seq: int
    vocab: int
    batch: int
    """Global batch, in samples."""
    pipeline_batch: int
    """The same where it must divide into 8 microbatches."""
    steps: int
    """Steps in a block."""
    repeat: int
    """Rounds run for each round asked for: short blocks, many of them."""


SIZES = {
    "small": Size("small", 4, 4, 128, 64, 65, 12, 16, 5, 3),  # nanoGPT's CPU configuration
    "large": Size("large", 8, 8, 512, 256, 256, 8, 8, 1, 1),
}


@dataclass(frozen=True)
class Setting:
    """What a contender is built from."""

    size: Size
    world: World
    batches: tuple[Batch, ...]
    """Global batches, used in turn; token ids and targets, each ``[batch, seq]`` int64."""
    weights: State | None
    """Initial weights by global name; None (a contender measured alone) leaves them to it."""

    def batch(self, step: int, parts: int = 1, part: int = 0) -> Batch:
        """Rows of the global batch of a step that belong to one of ``parts`` data-parallel ranks."""
        x, y = self.batches[step % len(self.batches)]
        return x.tensor_split(parts)[part], y.tensor_split(parts)[part]


Step = Callable[[int], float | None]
"""``step(i)``: train on batch i; this rank's loss (the mean over its samples), None where it has none."""
Build = Callable[[Setting], Step]


class Absent(Exception):
    """A peer cannot run here; the message says what would make it run."""


def make_batches(size: Size, batch: int, count: int = 4) -> tuple[Batch, ...]:
    """Walks through the vocabulary with a random choice at every token: something a model can learn."""
    gen = torch.Generator().manual_seed(5)
    out = []
    for _ in range(count):
        ids = [torch.randint(size.vocab, (batch,), generator=gen)]
        for _ in range(size.seq):
            ids.append((3 * ids[-1] + torch.randint(2, (batch,), generator=gen)) % size.vocab)
        walk = torch.stack(ids, 1)
        out.append((walk[:, :-1].contiguous(), walk[:, 1:].contiguous()))
    return tuple(out)
