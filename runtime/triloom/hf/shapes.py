"""A decoder's shape as Hugging Face's config.json, and back. Pure; what one side cannot express is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..models.config import DecoderConfig, gpt2, llama
from .names import Table, gpt2_names, llama_names

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One of the two well-known shapes."""

    name: str
    """``model_type`` of config.json, and ``model.shape`` of a run."""
    fixed: Mapping[str, tuple[Any, ...]]
    """Keys of config.json that change what the model computes -> the values we compute the same; the first is
    written, and stands for a key that is missing."""
    read: Callable[[Json], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    table: Callable[[DecoderConfig, str], Table]
    prefix: str
    """Of the names of a model with a head; a folder of the bare model has none."""
    own: Mapping[str, Any]
    """Fields that every decoder of this family has."""


def _need(c: Json, key: str) -> Any:
    if c.get(key) is None:
        raise ConfigError(f"config.json has no {key!r}; is it the folder of a whole model?")
    return c[key]


def _rope_theta(c: Json) -> float:
    """Transformers 5 has ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``."""
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"rope type {kind!r} scales the rotation; only unscaled rotary positions are supported")
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor = {partial!r}: only rotation of whole heads is supported")
    return float(rope["rope_theta"] if "rope_theta" in rope else c.get("rope_theta") or 10000.0)


def _read_llama(c: Json) -> DecoderConfig:
    hidden, heads = _need(c, "hidden_size"), _need(c, "num_attention_heads")
    head_dim = c.get("head_dim")
    if head_dim is not None and head_dim * heads != hidden:
        raise ConfigError(
            f"head_dim = {head_dim}: only hidden_size / num_attention_heads = {hidden / heads:g} is supported"
        )
    biases = bool(c.get("attention_bias", False)), bool(c.get("mlp_bias", False))
    if biases[0] != biases[1]:
        raise ConfigError(
            f"attention_bias = {biases[0]} and mlp_bias = {biases[1]}: only both or neither are supported"
        )
    return llama(
        vocab=_need(c, "vocab_size"),
        hidden=hidden,
        layers=_need(c, "num_hidden_layers"),
        heads=heads,
        kv_heads=c.get("num_key_value_heads"),
        ffn=_need(c, "intermediate_size"),
        max_seq=_need(c, "max_position_embeddings"),
        tied=bool(c.get("tie_word_embeddings", False)),
        bias=biases[0],
        rope_theta=_rope_theta(c),
        norm_eps=float(c.get("rms_norm_eps", 1e-6)),
        init_std=float(c.get("initializer_range", 0.02)),
    )


def _write_llama(c: DecoderConfig) -> dict[str, Any]:
    """Both spellings of the rotation's base, for every version of the library."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "hidden_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.ffn,
        "max_position_embeddings": c.max_seq,
        "tie_word_embeddings": c.tied,
        "attention_bias": c.bias,
        "mlp_bias": c.bias,
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_theta": c.rope_theta, "rope_type": "default"},
        "rms_norm_eps": c.norm_eps,
        "initializer_range": c.init_std,
    }


def _read_gpt2(c: Json) -> DecoderConfig:
    return gpt2(
        vocab=_need(c, "vocab_size"),
        hidden=_need(c, "n_embd"),
        layers=_need(c, "n_layer"),
        heads=_need(c, "n_head"),
        ffn=c.get("n_inner"),
        max_seq=_need(c, "n_positions"),
        tied=bool(c.get("tie_word_embeddings", True)),
        norm_eps=float(c.get("layer_norm_epsilon", 1e-5)),
        init_std=float(c.get("initializer_range", 0.02)),
    )


def _write_gpt2(c: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": c.vocab,
        "n_embd": c.hidden,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.ffn,
        "n_positions": c.max_seq,
        "tie_word_embeddings": c.tied,
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.init_std,
        "resid_pdrop": c.dropout,
        "embd_pdrop": c.dropout,
        "attn_pdrop": c.attention_dropout,
    }


FAMILIES: Mapping[str, Family] = {
    f.name: f
    for f in (
        Family(
            "llama",
            {"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None), "quantization_config": (None,)},
            _read_llama,
            _write_llama,
            llama_names,
            "model.",
            {"norm": "rms", "act": "swiglu", "positions": "rope"},
        ),
        Family(
            "gpt2",
            {
                "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False, None),
                "add_cross_attention": (False, None),
                "quantization_config": (None,),
            },
            _read_gpt2,
            _write_gpt2,
            gpt2_names,
            "transformer.",
            {"norm": "layer", "act": "gelu", "positions": "learned", "bias": True},
        ),
    )
}


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}
"""Without these GPT-2 has those of its own vocabulary."""


def from_json(config: Json) -> tuple[Family, DecoderConfig]:
    """The decoder that a config.json describes; dropout is a matter of training and left at 0. Raises ConfigError."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ConfigError(f"model_type = {config.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    wrong = [
        f"{key} = {config[key]!r} (must be {allowed[0]!r})"
        for key, allowed in family.fixed.items()
        if key in config and config[key] not in allowed
    ]
    if wrong:
        raise ConfigError(f"a {family.name} with {', '.join(wrong)} computes something else than ours")
    return family, family.read(config)


def family_of(c: DecoderConfig) -> Family:
    """The family a decoder belongs to. Raises ConfigError for a mixture that Hugging Face has no class for."""
    family, wrong = min(((family, _foreign(family, c)) for family in FAMILIES.values()), key=lambda pair: len(pair[1]))
    if wrong:
        raise ConfigError(f"Hugging Face's {family.name} is nearest, but this decoder has {', '.join(wrong)}")
    return family


def _foreign(family: Family, c: DecoderConfig) -> list[str]:
    wrong = [f"{k} = {getattr(c, k)!r}, not {v!r}" for k, v in family.own.items() if getattr(c, k) != v]
    if family.name == "gpt2" and c.kv_heads != c.heads:
        wrong.append(f"kv_heads = {c.kv_heads}, not heads = {c.heads}")
    return wrong


def to_json(c: DecoderConfig, dtype: str) -> dict[str, Any]:
    """config.json of a decoder, which knows no special tokens. dtype: torch's name of what the tensors are stored in
    (two spellings: transformers 5 and before)."""
    family = family_of(c)
    fixed = {key: allowed[0] for key, allowed in family.fixed.items() if allowed[0] is not None}
    head = {"model_type": family.name, "dtype": dtype, "torch_dtype": dtype}
    return {**head, **family.write(c), **fixed, **NO_TOKENS}
