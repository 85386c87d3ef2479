"""A Llama-shaped decoder in plain PyTorch, trained in bf16 with fp32 masters; parameters carry triloom's names.

RMSNorm, rotary positions (half-split, angles in fp32), grouped-query ``scaled_dot_product_attention``, SwiGLU on a
fused projection, an untied head. Forward and loss are one graph of torch.compile; AdamW is torch's fused one, on the
masters, whose fp32 gradients are copied from the bf16 ones in one foreach call, as are the new parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..work import CLIP, Batch, State, Step
from .gpt import adamw, initialise


@dataclass(frozen=True)
class Shape:
    """Sizes as of ``triloom.models.llama``."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    seq: int
    theta: float = 10000.0
    eps: float = 1e-5


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(shape.hidden)), shape.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, self.dim = shape, shape.hidden // shape.heads
        self.qkv = nn.Linear(shape.hidden, (shape.heads + 2 * shape.kv_heads) * self.dim, bias=False)
        self.out = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, _ = x.shape
        heads, kv = self.shape.heads, self.shape.kv_heads
        q, k, v = self.qkv(x).view(b, s, -1, self.dim).transpose(1, 2).split([heads, kv, kv], 1)
        y = F.scaled_dot_product_attention(
            turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True, enable_gqa=heads != kv
        )
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each half of the channels with the other, in fp32, rounded once."""
    u, v = x.float().chunk(2, -1)
    return torch.cat((u * cos - v * sin, v * cos + u * sin), -1).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.hidden, 2 * shape.ffn, bias=False)
        self.down = nn.Linear(shape.ffn, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.attention = Norm(shape), Attention(shape)
        self.norm2, self.mlp = Norm(shape), FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Embed(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocab, shape.hidden)


class Head(nn.Module):
    """Final norm and logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.head = Norm(shape), nn.Linear(shape.hidden, shape.vocab, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


class Llama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed, self.loss = Embed(shape), Head(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        dim = shape.hidden // shape.heads
        rates = shape.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.outer(torch.arange(shape.seq, dtype=torch.float64), rates)
        self.tables = angle.cos().float(), angle.sin().float()

    def forward(self, ids: Tensor, targets: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The mean loss over tokens."""
        x = self.embed.tokens(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.loss(x).flatten(0, 1).float(), targets.flatten())


def build(shape: Shape, device: torch.device, weights: State, batches: Sequence[Batch], *, compiled: bool) -> Step:
    """weights: fp32, by triloom's names. Batches: on the device."""
    model = Llama(shape)
    initialise(model, weights)
    model.to(device, torch.bfloat16)
    tables = [t.to(device) for t in model.tables]
    low = list(model.parameters())
    masters = [nn.Parameter(weights[name].to(device, torch.float32)) for name, _ in model.named_parameters()]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = adamw(masters)
    loss_of: Callable[..., Tensor] = torch.compile(model) if compiled else model

    def step(i: int) -> float:
        loss = loss_of(*batches[i % len(batches)], *tables)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in masters], [p.grad for p in low])
            model.zero_grad(set_to_none=True)
            nn.utils.clip_grad_norm_(masters, CLIP, foreach=True)
            optimizer.step()
            torch._foreach_copy_(low, masters)
        return loss.item()

    return step
