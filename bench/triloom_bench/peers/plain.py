"""One process: the training loop of PyTorch's documentation."""

from __future__ import annotations

import torch

from ..work import CLIP, Setting, Step
from .gpt import GPT, adamw, token_loss


def build(setting: Setting) -> Step:
    model = GPT(setting.size, setting.weights)
    optimizer = adamw(model.parameters())

    def step(i: int) -> float:
        x, y = setting.batch(i)
        optimizer.zero_grad(set_to_none=True)
        loss = token_loss(model(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step
