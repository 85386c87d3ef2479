"""Which Hugging Face tensors make up each parameter of a decoder. A pure table, read in both directions.

Fused projections are concatenations along dim 0, in the order query, key, value and gate, up. Both sides rotate
halves of a head (pairs ``i, i + d/2``), so queries and keys need no permutation. GPT-2 stores the weights of its
linear layers (``Conv1D``) as ``[in, out]``, the transpose of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..models.config import DecoderConfig


@dataclass(frozen=True)
class Block:
    """A Hugging Face tensor inside one of our parameters."""

    name: str
    rows: tuple[int, int]
    """Half-open range of dim 0 of our parameter."""
    shape: tuple[int, ...]
    """Of the Hugging Face tensor."""
    transposed: bool = False


Table = Mapping[str, tuple[Block, ...]]
"""Global name of a parameter -> the blocks it is made of, in order."""


@dataclass(frozen=True)
class _Layer:
    """A layer under its two names. ``outputs``: of each Hugging Face tensor; ``inputs`` 0: a vector (a norm)."""

    ours: str
    theirs: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    bias: bool
    transposed: bool = False

    def parameters(self) -> Iterator[tuple[str, tuple[Block, ...]]]:
        for kind in ("weight", "bias") if self.bias else ("weight",):
            flat = kind == "bias" or not self.inputs
            turned = self.transposed and not flat
            blocks, start = [], 0
            for theirs, out in zip(self.theirs, self.outputs, strict=True):
                shape = (out,) if flat else (self.inputs, out) if turned else (out, self.inputs)
                blocks.append(Block(f"{theirs}.{kind}", (start, start + out), shape, turned))
                start += out
            yield f"{self.ours}.{kind}", tuple(blocks)


def llama_names(c: DecoderConfig, prefix: str = "model.") -> Table:
    """Of ``LlamaForCausalLM``."""
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layers = [_Layer("embed.tokens", (f"{prefix}embed_tokens",), (c.vocab,), c.hidden, False)]
    for i in range(c.layers):
        ours, theirs = f"blocks.{i}", f"{prefix}layers.{i}"
        attention = tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv")
        layers += [
            _Layer(f"{ours}.norm1", (f"{theirs}.input_layernorm",), (c.hidden,), 0, False),
            _Layer(f"{ours}.attention.qkv", attention, (q, kv, kv), c.hidden, c.bias),
            _Layer(f"{ours}.attention.out", (f"{theirs}.self_attn.o_proj",), (c.hidden,), q, c.bias),
            _Layer(f"{ours}.norm2", (f"{theirs}.post_attention_layernorm",), (c.hidden,), 0, False),
            _Layer(
                f"{ours}.mlp.up",
                (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"),
                (c.ffn, c.ffn),
                c.hidden,
                c.bias,
            ),
            _Layer(f"{ours}.mlp.down", (f"{theirs}.mlp.down_proj",), (c.hidden,), c.ffn, c.bias),
        ]
    layers.append(_Layer("loss.norm", (f"{prefix}norm",), (c.hidden,), 0, False))
    return _table(layers, c)


def gpt2_names(c: DecoderConfig, prefix: str = "transformer.") -> Table:
    """Of ``GPT2LMHeadModel``."""
    h = c.hidden
    layers = [
        _Layer("embed.tokens", (f"{prefix}wte",), (c.vocab,), h, False),
        _Layer("embed.positions", (f"{prefix}wpe",), (c.max_seq,), h, False),
    ]
    for i in range(c.layers):
        ours, theirs = f"blocks.{i}", f"{prefix}h.{i}"
        layers += [
            _Layer(f"{ours}.norm1", (f"{theirs}.ln_1",), (h,), 0, True),
            _Layer(f"{ours}.attention.qkv", (f"{theirs}.attn.c_attn",), (3 * h,), h, True, True),
            _Layer(f"{ours}.attention.out", (f"{theirs}.attn.c_proj",), (h,), h, True, True),
            _Layer(f"{ours}.norm2", (f"{theirs}.ln_2",), (h,), 0, True),
            _Layer(f"{ours}.mlp.up", (f"{theirs}.mlp.c_fc",), (c.ffn,), h, True, True),
            _Layer(f"{ours}.mlp.down", (f"{theirs}.mlp.c_proj",), (h,), c.ffn, True, True),
        ]
    layers.append(_Layer("loss.norm", (f"{prefix}ln_f",), (h,), 0, True))
    return _table(layers, c)


def _table(layers: list[_Layer], c: DecoderConfig) -> Table:
    """A tied projection is the embedding, on both sides."""
    if not c.tied:
        layers.append(_Layer("loss.head", ("lm_head",), (c.vocab,), c.hidden, False))
    return {name: blocks for layer in layers for name, blocks in layer.parameters()}
