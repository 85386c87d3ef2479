"""The units of a decoder: embedding, block, loss. Each takes and gives one tensor.

Activations are ``[b, s, h]``, or ``[s / tp, b, h]`` under sequence parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triloom_kernels.fused_loss import CHUNK

from ..errors import ConfigError
from ..mesh import check_divides
from ..scope import Scope
from ..shards import ShardSpec
from ..tp import (
    ColumnParallelLinear,
    Dropout,
    Init,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_vocab,
    layout_of,
    loss_parts,
    loss_weight,
    parameter,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from .attention import Attention, RopeTables
from .config import DecoderConfig

EMBED, LOSS = "embed", "loss"
TOKENS, HEAD = f"{EMBED}.tokens", f"{LOSS}.head"


def make_norm(config: DecoderConfig, scope: Scope, name: str) -> RMSNorm | LayerNorm:
    if config.norm == "rms":
        return RMSNorm(config.hidden, scope=scope, name=name, eps=config.norm_eps)
    return LayerNorm(config.hidden, scope=scope, name=name, eps=config.norm_eps, bias=config.bias)


class Positions(nn.Module):
    """Adds a learned vector for each position. Under sequence parallelism a rank's gradient covers its positions."""

    def __init__(self, config: DecoderConfig, scope: Scope, name: str) -> None:
        super().__init__()
        self.layout = layout_of(scope)
        spec = ShardSpec((config.max_seq, config.hidden), partial_grad=self.layout.sequence)
        self.shards = {"weight": spec}
        self.weight = parameter(scope, f"{name}.weight", spec, Init(std=config.init_std))

    def forward(self, x: Tensor) -> Tensor:
        length = self.layout.length(x)
        if length > len(self.weight):
            raise ConfigError(f"a sequence of {length} tokens is longer than the model's max_seq={len(self.weight)}")
        return x + self.layout.over_batch(self.weight[self.layout.positions(length)])


class Embed(nn.Module):
    """Token ids ``[b, s]`` (int64) to activations."""

    def __init__(self, config: DecoderConfig, scope: Scope) -> None:
        super().__init__()
        self.layout = layout_of(scope)
        self.tokens = VocabParallelEmbedding(config.vocab, config.hidden, scope=scope, name=TOKENS, std=config.init_std)
        self.positions = Positions(config, scope, f"{EMBED}.positions") if config.positions == "learned" else None
        self.dropout = Dropout(config.dropout, scope=scope, site="embed")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(self.layout.tokens(ids))
        if self.positions is not None:
            x = self.positions(x)
        out: Tensor = self.dropout(x)
        return out


class FeedForward(nn.Module):
    """SwiGLU or GeGLU on a fused gate/up projection, or GELU."""

    def __init__(self, config: DecoderConfig, scope: Scope, name: str) -> None:
        super().__init__()
        check_divides("ffn", config.ffn, "tp", scope.tp.size)
        self.act = scope.kernels.pick(config.act, scope.device)
        self.up = ColumnParallelLinear(
            config.hidden,
            sum(config.up_parts),
            scope=scope,
            name=f"{name}.up",
            parts=config.up_parts,
            bias=config.bias,
            std=config.init_std,
        )
        self.down = RowParallelLinear(
            config.ffn, config.hidden, scope=scope, name=f"{name}.down", bias=config.bias, std=config.residual_std
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(self, config: DecoderConfig, scope: Scope, name: str, tables: RopeTables | None) -> None:
        super().__init__()
        self.norm1 = make_norm(config, scope, f"{name}.norm1")
        self.attention = Attention(config, scope, f"{name}.attention", tables)
        self.dropout1 = Dropout(config.dropout, scope=scope, site="attention")
        self.norm2 = make_norm(config, scope, f"{name}.norm2")
        self.mlp = FeedForward(config, scope, f"{name}.mlp")
        self.dropout2 = Dropout(config.dropout, scope=scope, site="mlp")

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x))
        if self.dropout1.active:
            x = self.dropout1.add(y, x)
            y = self.norm2(x)
        else:
            x, y = self.norm2.after_adding(y, x)
        return self.dropout2.add(self.mlp(y), x)


class Loss(nn.Module):
    """Final norm, output projection and cross-entropy. Targets: ``[b, s]`` int64, -100 is ignored."""

    def __init__(self, config: DecoderConfig, scope: Scope) -> None:
        super().__init__()
        self.vocab, self.scope, self.layout = config.vocab, scope, layout_of(scope)
        self.norm = make_norm(config, scope, f"{LOSS}.norm")
        # A tied projection draws the embedding's values: wherever the two live, they start equal.
        self.head = ColumnParallelLinear(
            config.hidden,
            config.vocab,
            scope=scope,
            name=TOKENS if config.tied else HEAD,
            bias=False,
            uneven=True,
            std=config.init_std,
        )
        self._parts, self._fused = loss_parts(scope.kernels, scope.device), config.fused_loss

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``(sum of the losses, number of targets that count)``."""
        x, targets = self.norm(x), self.layout.tokens(targets)
        if self._fuses(x, targets):
            return vocab_parallel_linear_cross_entropy(
                x,
                self.head.weight,
                targets,
                group=self.scope.tp,
                vocab=self.vocab,
                sequence=self.layout.sequence,
                sink=self.scope.grads,
                parts=self._parts,
            )
        return vocab_parallel_cross_entropy(
            self.head(x),
            targets,
            group=self.scope.tp,
            vocab=self.vocab,
            parts=self._parts,
            in_place=True,  # nothing else reads the logits
        )

    def _fuses(self, x: Tensor, targets: Tensor) -> bool:
        """If not told: on a GPU, for more tokens than a chunk, and not in fp16, whose gradients need a scale first."""
        if self._fused is not None:
            return self._fused
        return x.is_cuda and targets.numel() > CHUNK and x.dtype != torch.float16

    def weight(self, targets: Tensor) -> Tensor:
        """Number of targets that count, 0-dim fp64."""
        return loss_weight(targets)

    def logits(self, x: Tensor) -> Tensor:
        """Whole logits ``[b, s, vocab]`` on every rank, for inference."""
        return self.layout.batch_first(gather_vocab(self.head(self.norm(x)), self.vocab, self.scope.tp))
