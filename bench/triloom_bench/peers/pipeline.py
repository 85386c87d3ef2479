"""torch.distributed.pipelining over gloo: its schedules, with the shapes between stages given.

The library knows neither tied weights nor a global norm: the gradients of the two copies are added (by one
all_reduce where they are on two ranks), and the squared norm is summed by another, the tied matrix counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from ..work import CLIP, MICROBATCHES, Setting, Step
from . import gloo
from .gpt import Block, Embed, Head, adamw, initialise, token_loss

Where = Callable[[int, int], tuple[int, ...]]
"""Stages of a rank, of so many ranks."""

KINDS: Mapping[str, tuple[type[Any], int, Where]] = {
    "gpipe": (ScheduleGPipe, 1, lambda rank, ranks: (rank,)),
    "one_f_one_b": (Schedule1F1B, 1, lambda rank, ranks: (rank,)),
    "interleaved": (ScheduleInterleaved1F1B, 2, lambda rank, ranks: (rank, ranks + rank)),
    "zero_bubble": (ScheduleInterleavedZeroBubble, 2, lambda rank, ranks: (rank, ranks + rank)),
    "zbv": (ScheduleZBVZeroBubble, 2, lambda rank, ranks: (rank, 2 * ranks - 1 - rank)),
}
"""Schedule, stages a rank, and which."""


class Stage(nn.Module):
    """Part of the model: some blocks, the embedding before the first and the head after the last; names as in the
    whole."""

    def __init__(self, setting: Setting, index: int, count: int) -> None:
        super().__init__()
        size = setting.size
        mine = torch.arange(size.layers).tensor_split(count)[index].tolist()
        self.embed = Embed(size) if index == 0 else None
        self.blocks = nn.ModuleDict({str(i): Block(size) for i in mine})
        self.loss = Head(size) if index == count - 1 else None
        weights = setting.weights
        if weights is not None and self.loss is not None:
            weights = {**weights, "loss.head.weight": weights["embed.tokens.weight"]}
        initialise(self, weights)
        self.tied = self.embed.tokens.weight if self.embed else self.loss.head.weight if self.loss else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.loss is None else self.loss(x)


def tie(parts: Sequence[Stage]) -> None:
    """The gradients of the two copies of the tied matrix added up."""
    copies = [part.tied.grad for part in parts if part.tied is not None]
    if len(copies) == 2:
        copies[0].add_(copies[1])
        copies[1].copy_(copies[0])
    elif copies and dist.get_world_size() == 2:
        dist.all_reduce(copies[0])


def clip(parts: Sequence[Stage]) -> None:
    """Global norm over all stages, the tied matrix counted on the first only."""
    grads, counted = [], []
    for part in parts:
        for p in part.parameters():
            if p.grad is not None:
                grads.append(p.grad)
                if p is not part.tied or part.embed is not None:
                    counted.append(p.grad)
    square = torch.nn.utils.get_total_norm(counted).square()
    dist.all_reduce(square)
    torch._foreach_mul_(grads, torch.clamp(CLIP / (square.sqrt() + 1e-6), max=1.0))


def build_kind(kind: str, setting: Setting) -> Step:
    size, world = setting.size, setting.world
    gloo.start(world)
    make, chunks, where = KINDS[kind]
    count, mine = chunks * world.size, where(world.rank, world.size)
    parts = [Stage(setting, index, count) for index in mine]
    rows = size.pipeline_batch // MICROBATCHES
    act = torch.empty(rows, size.seq, size.hidden, requires_grad=True)
    ids = torch.zeros(rows, size.seq, dtype=torch.int64)
    logits = torch.empty(rows, size.seq, size.vocab)
    stages = [
        PipelineStage(
            part,
            index,
            count,
            torch.device("cpu"),
            input_args=(ids if index == 0 else act,),
            output_args=(logits if index == count - 1 else act,),
        )
        for part, index in zip(parts, mine, strict=True)
    ]
    schedule = make(stages if chunks > 1 else stages[0], MICROBATCHES, loss_fn=token_loss)
    optimizer = adamw(p for part in parts for p in part.parameters())
    first, last = 0 in mine, count - 1 in mine

    def step(i: int) -> float | None:
        x, y = setting.batch(i)
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        schedule.step(*((x,) if first else ()), **({"target": y, "losses": losses} if last else {}))
        tie(parts)
        clip(parts)
        optimizer.step()
        return torch.stack(losses).mean().item() if last else None

    return step


def gpipe(setting: Setting) -> Step:
    return build_kind("gpipe", setting)


def one_f_one_b(setting: Setting) -> Step:
    return build_kind("one_f_one_b", setting)


def interleaved(setting: Setting) -> Step:
    return build_kind("interleaved", setting)


def zero_bubble(setting: Setting) -> Step:
    return build_kind("zero_bubble", setting)


def zbv(setting: Setting) -> Step:
    return build_kind("zbv", setting)
