"""torch DistributedDataParallel over gloo: gradients in bucket views, all_reduce while the backward runs."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from ..work import CLIP, Setting, Step
from . import gloo
from .gpt import GPT, adamw, token_loss


def build(setting: Setting) -> Step:
    world = setting.world
    gloo.start(world)
    model = DistributedDataParallel(GPT(setting.size, setting.weights), gradient_as_bucket_view=True)
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
