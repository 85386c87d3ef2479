"""torch.distributed.pipelining over gloo: PipelineStage and Schedule1F1B, the shapes between stages given.

The library knows neither tied weights nor a global norm: the gradients of the two copies are added by one
all_reduce, as is the squared norm, in which the tied matrix counts once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from ..work import CLIP, Setting, Step
from . import gloo
from .gpt import Block, Embed, Head, adamw, initialise, token_loss


class Stage(nn.Module):
    """Half of the model: embedding and first blocks, or last blocks and head; names as in the whole."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        size, world = setting.size, setting.world
        first, last = world.rank == 0, world.rank == world.size - 1
        mine = torch.arange(size.layers).tensor_split(world.size)[world.rank].tolist()
        self.embed = Embed(size) if first else None
        self.blocks = nn.ModuleDict({str(i): Block(size) for i in mine})
        self.loss = Head(size) if last else None
        weights = setting.weights
        if weights is not None and last:
            weights = {**weights, "loss.head.weight": weights["embed.tokens.weight"]}
        initialise(self, weights)
        self.tied = self.embed.tokens.weight if self.embed else self.loss.head.weight if self.loss else None

    def forward(self, x: Tensor) -> Tensor:
        if self.embed is not None:
            x = self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.loss is None else self.loss(x)


def clip(stage: Stage, world_rank: int) -> None:
    """Global norm over both stages, the tied matrix counted on the first only."""
    grads = [p.grad for p in stage.parameters() if p.grad is not None]
    counted = [p.grad for p in stage.parameters() if p.grad is not None and (p is not stage.tied or world_rank == 0)]
    square = torch.nn.utils.get_total_norm(counted).square()
    dist.all_reduce(square)
    torch._foreach_mul_(grads, torch.clamp(CLIP / (square.sqrt() + 1e-6), max=1.0))


def build(setting: Setting) -> Step:
    size, world = setting.size, setting.world
    gloo.start(world)
    module = Stage(setting)
    microbatches = 8
    rows = size.pipeline_batch // microbatches
    act = torch.empty(rows, size.seq, size.hidden, requires_grad=True)
    ids = torch.zeros(rows, size.seq, dtype=torch.int64)
    last = world.rank == world.size - 1
    stage = PipelineStage(
        module,
        world.rank,
        world.size,
        torch.device("cpu"),
        input_args=(ids if world.rank == 0 else act,),
        output_args=(torch.empty(rows, size.seq, size.vocab) if last else act,),
    )
    schedule = Schedule1F1B(stage, microbatches, loss_fn=token_loss)
    optimizer = adamw(module.parameters())

    def step(i: int) -> float | None:
        x, y = setting.batch(i)
        optimizer.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        if world.rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses)
        dist.all_reduce(module.tied.grad)
        clip(module, world.rank)
        optimizer.step()
        return torch.stack(losses).mean().item() if last else None

    return step
