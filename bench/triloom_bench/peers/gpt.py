"""The benches' model as plain PyTorch; parameters carry the names of triloom's units."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..work import BETAS, DECAY, EPS, LR, Size, State


class Embed(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocab, size.hidden)
        self.positions = nn.Embedding(size.seq, size.hidden)

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.positions.weight[: ids.shape[1]]


class Attention(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.hidden // size.heads
        self.qkv = nn.Linear(size.hidden, 3 * size.hidden)
        self.out = nn.Linear(size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (
            t.view(b, s, -1, self.head_dim).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )  # heads of this rank, however many
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class FeedForward(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.up = nn.Linear(size.hidden, 4 * size.hidden)
        self.down = nn.Linear(4 * size.hidden, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(size.hidden)
        self.attention = Attention(size)
        self.norm2 = nn.LayerNorm(size.hidden)
        self.mlp = FeedForward(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """Final norm and logits."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size.hidden)
        self.head = nn.Linear(size.hidden, size.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class GPT(nn.Module):
    def __init__(self, size: Size, weights: State | None = None) -> None:
        super().__init__()
        self.embed = Embed(size)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.loss = Head(size)
        self.loss.head.weight = self.embed.tokens.weight
        initialise(self, weights)

    def forward(self, ids: Tensor) -> Tensor:
        return self.loss(self.blocks(self.embed(ids)))


def initialise(module: nn.Module, weights: State | None) -> None:
    """Copy weights by name into whatever part of the model ``module`` is; every parameter must be there."""
    with torch.no_grad():
        for name, param in module.named_parameters():
            if weights is not None:
                param.copy_(weights[name])
            elif param.dim() > 1:
                param.normal_(std=0.02)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def groups_of(params: Iterable[nn.Parameter]) -> list[dict[str, object]]:
    """Weight decay on matrices only."""
    params = list(params)
    return [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(params: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups_of(params), lr=LR, betas=BETAS, eps=EPS, fused=True)
