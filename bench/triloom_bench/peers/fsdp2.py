"""torch FSDP2 (fully_shard) over gloo: every block sharded by itself, the rest of the model together."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ..work import CLIP, Setting, Step
from . import gloo
from .gpt import GPT, adamw, token_loss


def build(setting: Setting) -> Step:
    world = setting.world
    gloo.start(world)
    mesh = init_device_mesh("cpu", (world.size,))
    model = GPT(setting.size, setting.weights)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model.parameters())

    def step(i: int) -> float:
        x, y = setting.batch(i, world.size, world.rank)
        optimizer.zero_grad(set_to_none=True)
        loss = token_loss(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step
