"""Names, shapes and folders of Hugging Face without their library: refusals, parts, damaged files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triloom.errors import ConfigError
from triloom.hf.folder import INDEX, ONE, open_folder, write_folder
from triloom.hf.shapes import FAMILIES, from_json, to_json
from triloom.hf.weights import open_weights
from triloom.models import DecoderConfig, decoder, gpt2, llama
from triloom.parts import Part, part_of
from triloom.scope import Scope
from triloom.shards import ShardSpec

SIZES: dict[str, Any] = {"vocab": 11, "hidden": 8, "layers": 2, "heads": 4, "max_seq": 6}
CONFIGS = {
    "llama": llama(**SIZES, kv_heads=2, ffn=12, rope_theta=500.0, norm_eps=1e-6),
    "llama tied biases": llama(**SIZES, ffn=12, tied=True, bias=True),
    "gpt2": gpt2(**SIZES),
    "gpt2 untied": gpt2(**SIZES, tied=False, ffn=20),
}


def shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Of our parameters."""
    model = decoder(config)
    units = {**model.units, "loss": model.loss}
    out = {f"{u}.{n}": tuple(p.shape) for u, make in units.items() for n, p in make(Scope()).named_parameters()}
    return {n: s for n, s in out.items() if not (config.tied and n == "loss.head.weight")}


def written(folder: Path, config: DecoderConfig, **options: Any) -> dict[str, torch.Tensor]:
    """A folder of numbered elements; returns its tensors."""
    family = FAMILIES["gpt2" if config.positions == "learned" else "llama"]
    draw = torch.Generator().manual_seed(3)
    blocks = [b for blocks in family.table(config, family.prefix).values() for b in blocks]
    tensors = {b.name: torch.randn(b.shape, generator=draw) for b in blocks}
    sizes = {b.name: b.shape for b in blocks}
    write_folder(folder, to_json(config, "float32"), sizes, torch.float32, tensors.items(), **options)
    return tensors


@pytest.mark.parametrize("which", CONFIGS)
def test_the_table_covers_every_parameter_and_config_json_says_the_same_decoder(which: str) -> None:
    config = CONFIGS[which]
    family, again = from_json(to_json(config, "float32"))
    assert again == config
    table = family.table(config, family.prefix)
    for name, shape in shapes(config).items():
        *_, last = blocks = table.pop(name)
        assert last.rows[1] == shape[0] and blocks[0].rows[0] == 0
        for block in blocks:
            size = (block.rows[1] - block.rows[0], *shape[1:])
            assert block.shape == (size[::-1] if block.transposed else size)
    assert not table


@pytest.mark.parametrize("which", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [5 << 30, 700])
def test_any_part_of_a_parameter_is_read_alone(tmp_path: Path, which: str, shard_bytes: int) -> None:
    config = CONFIGS[which]
    written(tmp_path / "hf", config, shard_bytes=shard_bytes)
    assert (tmp_path / "hf" / (ONE if shard_bytes > 700 else INDEX)).exists()
    weights = open_weights(tmp_path / "hf")
    for name, shape in shapes(config).items():
        whole = weights.read(name).view(shape)
        splits = [(None, ()), (0, ((0, 1), (shape[0] // 2, shape[0])))]
        splits += [(1, ((1, 3), (4, shape[1])))] if len(shape) > 1 else []
        for dim, slices in splits:
            spec = ShardSpec(shape, dim, slices)
            local = whole if dim is None else torch.cat([whole.narrow(dim, a, b - a) for a, b in slices], dim)
            for start, stop in ((0, local.numel()), (3, local.numel() - 1), (2, 3), (4, 4)):
                got = weights.read(name, part_of(spec, start, stop))
                assert torch.equal(got, local.reshape(-1)[start:stop]), (name, dim, start, stop)


def test_fused_and_transposed_layers_are_put_together_in_order(tmp_path: Path) -> None:
    theirs = written(tmp_path / "llama", CONFIGS["llama"])
    ours = open_weights(tmp_path / "llama")
    at = "model.layers.1.self_attn"
    qkv = torch.cat([theirs[f"{at}.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(ours.read("blocks.1.attention.qkv.weight"), qkv.reshape(-1))
    theirs = written(tmp_path / "gpt2", CONFIGS["gpt2"])
    up = open_weights(tmp_path / "gpt2").read("blocks.0.mlp.up.weight").view(32, 8)
    assert torch.equal(up, theirs["transformer.h.0.mlp.c_fc.weight"].t())


def test_bare_models_old_buffers_and_shorter_sequences(tmp_path: Path) -> None:
    """As GPT-2's own first upload: no prefix, constants among the tensors."""
    config = CONFIGS["gpt2"]
    family = FAMILIES["gpt2"]
    blocks = [b for blocks in family.table(config, "").values() for b in blocks]
    sizes = {b.name: b.shape for b in blocks} | {"h.0.attn.bias": (1, 1, 6, 6)}
    tensors = {name: torch.randn(shape) for name, shape in sizes.items()}
    write_folder(tmp_path / "hf", to_json(config, "float32"), sizes, torch.float32, tensors.items())
    short = gpt2(**{**SIZES, "max_seq": 4})
    got = open_weights(tmp_path / "hf", short)
    assert torch.equal(got.read("embed.positions.weight"), tensors["wpe.weight"][:4].reshape(-1))
    untied = open_weights(tmp_path / "hf", gpt2(**SIZES, tied=False))
    assert torch.equal(untied.read("loss.head.weight"), tensors["wte.weight"].reshape(-1))


LLAMA, GPT2 = to_json(CONFIGS["llama"], "float32"), to_json(CONFIGS["gpt2"], "float32")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "model_type = 'bert' is not one of llama, gpt2"),
        ({**LLAMA, "hidden_act": "gelu"}, r"hidden_act = 'gelu' \(must be 'silu'\)"),
        ({**LLAMA, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' scales"),
        ({**LLAMA, "rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope type 'linear' scales"),
        ({**LLAMA, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({**LLAMA, "head_dim": 16}, "head_dim = 16: only hidden_size / num_attention_heads = 2"),
        ({**LLAMA, "attention_bias": True}, "attention_bias = True and mlp_bias = False: only both or neither"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "quantization_config"),
        ({**LLAMA, "vocab_size": None}, "no 'vocab_size'"),
        ({**GPT2, "activation_function": "relu"}, "activation_function = 'relu'"),
        ({**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ],
)
def test_what_computes_something_else_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (gpt2(**SIZES, bias=False), "gpt2 is nearest, but this decoder has bias = False, not True"),
        (gpt2(**SIZES, kv_heads=2), "kv_heads = 2, not heads = 4"),
        (DecoderConfig(**SIZES, kv_heads=4, ffn=8, act="gelu"), "act = 'gelu', not 'swiglu'"),
    ],
)
def test_what_hugging_face_has_no_class_for_is_refused(config: DecoderConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_json(config, "float32")


def test_another_model_is_named_in_words_of_the_configuration(tmp_path: Path) -> None:
    written(tmp_path / "hf", CONFIGS["gpt2 untied"])
    with pytest.raises(ConfigError, match=r"model.hidden = 16, there 8.*model.ffn = 64, there 20.*model.tied = true"):
        open_weights(tmp_path / "hf", gpt2(**{**SIZES, "hidden": 16}))
    with pytest.raises(ConfigError, match="model.seq = 9, there only 6 positions"):
        open_weights(tmp_path / "hf", gpt2(**{**SIZES, "max_seq": 9}, ffn=20, tied=False))


def drop(header: dict[str, Any]) -> None:
    del header["model.norm.weight"]


def rename(header: dict[str, Any]) -> None:
    header["model.layers.0.self_attn.q_norm.weight"] = header["model.norm.weight"]


def stretch(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["shape"] = [4, 2]


def overlong(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"][1] += 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "model.norm.weight is missing"),
        (rename, "q_norm.weight belongs to no parameter"),
        (stretch, r"model.norm.weight has shape \[4, 2\], not \[8\]"),
        (overlong, "damaged header"),
    ],
)
def test_folders_that_do_not_hold_what_they_say(
    tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    written(tmp_path / "hf", CONFIGS["llama"])
    path = tmp_path / "hf" / ONE
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.raises(ConfigError, match=message):
        open_weights(tmp_path / "hf")


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    with pytest.raises(ConfigError, match="is not a Hugging Face folder"):
        open_folder(folder)
    written(folder, CONFIGS["llama"], shard_bytes=700)
    index = json.loads((folder / INDEX).read_text())
    last = folder / max(index["weight_map"].values())
    raw = last.read_bytes()
    last.write_bytes(raw[:-3])
    with pytest.raises(ConfigError, match="is cut off"):
        open_folder(folder)
    last.write_bytes(raw[:6])
    with pytest.raises(ConfigError, match="not a safetensors file"):
        open_folder(folder)
    last.unlink()
    with pytest.raises(ConfigError, match=f"lacks {last.name}"):
        open_folder(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ConfigError, match="points outside"):
        open_folder(folder)
    (folder / INDEX).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="pytorch_model.bin is pickled, which is not read"):
        open_folder(folder)


def test_sizes_of_a_written_folder(tmp_path: Path) -> None:
    tensors = written(tmp_path / "hf", CONFIGS["llama"], shard_bytes=700)
    index = json.loads((tmp_path / "hf" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * math.prod(t.shape) for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    found = open_folder(tmp_path / "hf").tensors
    for name, t in tensors.items():
        assert torch.equal(found[name].read((0, t.shape[0])), t)


def test_part_of_nothing(tmp_path: Path) -> None:
    written(tmp_path / "hf", CONFIGS["llama"])
    assert open_weights(tmp_path / "hf").read("loss.norm.weight", Part(3, 3)).numel() == 0
