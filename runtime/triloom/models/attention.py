"""Causal self-attention with the heads split over tp."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..mesh import check_divides
from ..parallel.recompute import recompute
from ..scope import Scope
from ..tp import ColumnParallelLinear, HeadDropout, RowParallelLinear, layout_of
from .config import DecoderConfig

RopeTables = tuple[Tensor, Tensor]
"""cos and sin, each ``[max_seq, head_dim / 2]``."""


class Attention(nn.Module):
    """``[b, s, h]`` to the same shape (or ``[s / tp, b, h]`` under sequence parallelism).

    tables: the rotation of queries and keys, or None where positions are learned.
    """

    def __init__(self, config: DecoderConfig, scope: Scope, name: str, tables: RopeTables | None) -> None:
        super().__init__()
        tp, d = scope.tp.size, config.head_dim
        check_divides("heads", config.heads, "tp", tp)
        check_divides("kv_heads", config.kv_heads, "tp", tp)
        self.heads, self.kv_heads = config.heads // tp, config.kv_heads // tp
        self.scope = scope
        self.max_seq, self.layout, self.tables = config.max_seq, layout_of(scope), tables
        parts = (config.heads * d, config.kv_heads * d, config.kv_heads * d)
        self.qkv = ColumnParallelLinear(
            config.hidden,
            sum(parts),
            scope=scope,
            name=f"{name}.qkv",
            parts=parts,
            bias=config.bias,
            std=config.init_std,
        )
        self.out = RowParallelLinear(
            config.heads * d, config.hidden, scope=scope, name=f"{name}.out", bias=config.bias, std=config.residual_std
        )
        self._split_rotate = scope.kernels.pick("split_rotate", scope.device)
        self._softmax_attention = scope.kernels.pick("attention", scope.device)
        self.dropout = HeadDropout(config.attention_dropout, scope=scope, site="probabilities", heads=config.heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.layout.by_head(t) for t in self._split(self.qkv(x)))
        if self.scope.selective:
            y = recompute(self._attend, q, k, v, scope=self.scope, draws=False)
        else:
            y = self._attend(q, k, v)
        out: Tensor = self.out(self.layout.merge_heads(y))
        return out

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """By head, ``[b, heads, s, d]``."""
        if self.dropout.active:
            return self._dropped(q, k, v)
        out: Tensor = self._softmax_attention(q, k, v, causal=True)
        return out

    def _split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values by head, ``[b, s, heads, d]`` (or sequence first), rotated."""
        length = qkv.shape[0 if self.layout.sequence else 1]
        if length > self.max_seq:
            raise ConfigError(f"a sequence of {length} tokens is longer than the model's max_seq={self.max_seq}")
        if self.tables is None:
            heads = qkv.view(*qkv.shape[:2], self.heads + 2 * self.kv_heads, -1)
            return torch.split(heads, [self.heads, self.kv_heads, self.kv_heads], dim=2)
        cos, sin = (self.layout.over_batch(t[:length].unsqueeze(1)) for t in self.tables)
        out: tuple[Tensor, ...] = self._split_rotate(qkv, cos, sin, self.heads, self.kv_heads)
        return out

    def _dropped(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v with dropout on the probabilities; the softmax of 16-bit scores in fp32."""
        if self.heads != self.kv_heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        s = q.shape[-2]
        scores = torch.matmul(q / math.sqrt(q.shape[-1]), k.transpose(-2, -1))
        future = torch.ones(s, s, dtype=torch.bool, device=q.device).triu_(1)
        scores = scores.masked_fill(future, -math.inf)
        wide = scores.float() if scores.element_size() < 4 else scores
        return torch.matmul(self.dropout(wide.softmax(-1).to(q.dtype)), v)
