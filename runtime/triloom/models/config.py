"""The shape of a decoder: one frozen dataclass, and the two well-known shapes as functions."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from ..errors import ConfigError

CHOICES = {"norm": ("rms", "layer"), "act": ("swiglu", "geglu", "gelu"), "positions": ("rope", "learned")}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder. Use :func:`llama` or :func:`gpt2`, or mix."""

    vocab: int
    """Number of tokens."""
    hidden: int
    """Width of the residual stream; a multiple of heads."""
    layers: int
    heads: int
    kv_heads: int
    """Key and value heads; divides heads (grouped-query attention, arXiv 2305.13245)."""
    ffn: int
    """Inner width of the feed-forward layer."""
    max_seq: int
    """Longest sequence."""
    norm: str = "rms"
    """``rms`` or ``layer``."""
    act: str = "swiglu"
    """``swiglu`` or ``geglu`` (arXiv 2002.05202; fused gate and up projection), or ``gelu``."""
    positions: str = "rope"
    """``rope`` or ``learned``."""
    bias: bool = False
    """Biases in the linear layers of the blocks and in LayerNorm."""
    dropout: float = 0.0
    """After the embedding, the attention and the feed-forward layer."""
    attention_dropout: float = 0.0
    """On attention probabilities; above 0 the scores are materialised."""
    tied: bool = False
    """One matrix for the token embedding and the output projection."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    fused_loss: bool | None = None
    """Compute the output projection with its loss, 4096 tokens at a time, so that the logits never exist whole; None:
    on a GPU, for more tokens than that."""
    init_std: float = 0.02
    """Deviation of the initial weights; projections into the residual stream take it over sqrt(2 layers) (GPT-2)."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"decoder {f.name} must be a positive integer, got {value!r}")
            if f.name in CHOICES and value not in CHOICES[f.name]:
                raise ConfigError(f"decoder {f.name}={value!r} is not one of {', '.join(CHOICES[f.name])}")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"decoder {name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.hidden % self.heads:
            raise ConfigError(f"decoder hidden={self.hidden} must be a multiple of heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"decoder heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ConfigError(f"rotary positions need an even head size, got hidden/heads = {self.head_dim}")

    @property
    def up_parts(self) -> tuple[int, ...]:
        """Outputs of the feed-forward layer's first projection: gate and up, or up alone."""
        return (self.ffn,) * (1 if self.act == "gelu" else 2)

    @property
    def parameters(self) -> int:
        """Number of trainable values; a tied matrix counts once."""
        rows, d = self.heads + 2 * self.kv_heads, self.head_dim
        up = self.ffn * len(self.up_parts)
        matrices = self.hidden * (rows * d + self.heads * d + up + self.ffn)
        biases = rows * d + self.hidden + up + self.hidden if self.bias else 0
        norm = self.hidden * (2 if self.norm == "layer" and self.bias else 1)
        embedding = self.vocab * self.hidden * (1 if self.tied else 2)
        positions = self.max_seq * self.hidden if self.positions == "learned" else 0
        return self.layers * (matrices + biases + 2 * norm) + norm + embedding + positions

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def residual_std(self) -> float:
        return self.init_std / math.sqrt(2 * self.layers)


def llama(
    *,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    ffn: int | None = None,
    max_seq: int = 2048,
    tied: bool = False,
    bias: bool = False,
    dropout: float = 0.0,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    fused_loss: bool | None = None,
) -> DecoderConfig:
    """Llama shape (arXiv 2302.13971): RMSNorm, rotary positions, SwiGLU, no biases by default.

    kv_heads: as heads by default; ffn: 8/3 hidden rounded up to a multiple of 32 by default.
    """
    return DecoderConfig(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        ffn=-(-8 * hidden // 96) * 32 if ffn is None else ffn,
        max_seq=max_seq,
        tied=tied,
        bias=bias,
        dropout=dropout,
        rope_theta=rope_theta,
        norm_eps=norm_eps,
        init_std=init_std,
        fused_loss=fused_loss,
    )


def gpt2(
    *,
    vocab: int,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    ffn: int | None = None,
    max_seq: int = 1024,
    tied: bool = True,
    bias: bool = True,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    init_std: float = 0.02,
    fused_loss: bool | None = None,
) -> DecoderConfig:
    """GPT-2 shape (Radford et al., 2019): LayerNorm, learned positions, GELU, biases, tied output projection.

    kv_heads: as heads by default; ffn: 4 hidden by default.
    """
    return DecoderConfig(
        vocab=vocab,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads if kv_heads is None else kv_heads,
        ffn=4 * hidden if ffn is None else ffn,
        max_seq=max_seq,
        norm="layer",
        act="gelu",
        positions="learned",
        bias=bias,
        dropout=dropout,
        attention_dropout=attention_dropout,
        tied=tied,
        norm_eps=norm_eps,
        init_std=init_std,
        fused_loss=fused_loss,
    )
