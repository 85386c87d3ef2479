"""Both decoder shapes: one rank against plain PyTorch written here, many ranks (as threads) against one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triloom.errors import ConfigError, MeshError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.models import DecoderConfig, decoder, gpt2, llama
from triloom.scope import Scope
from triloom.shards import ShardSpec
from triloom.tp import reduce_partial_grads

F64 = torch.float64
SIZES: dict[str, Any] = {"vocab": 31, "hidden": 48, "layers": 2, "heads": 12, "max_seq": 16, "init_std": 0.1}
CONFIGS = {
    "llama": llama(**SIZES, ffn=72),
    "llama gqa": llama(**SIZES, kv_heads=6, ffn=72, rope_theta=100.0),
    "llama tied": llama(**SIZES, ffn=72, tied=True),
    "gpt2": gpt2(**SIZES, ffn=72),
    "geglu": replace(llama(**SIZES, ffn=72), act="geglu"),
    "gpt2 untied gqa": gpt2(**SIZES, ffn=72, kv_heads=6, tied=False, bias=False),
}
BATCH, LENGTH = 3, 12


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(31, (BATCH, LENGTH), generator=draw)
    targets = torch.randint(31, (BATCH, LENGTH), generator=draw)
    targets[0, :7] = -100
    targets[2] = -100
    return ids, targets


def build(config: DecoderConfig, scope: Scope) -> nn.ModuleDict:
    """The units by name, as the engine would hold them."""
    model = decoder(config)
    units = {name: make(scope) for name, make in model.units.items()} | {"loss": model.loss(scope)}
    return nn.ModuleDict({name.replace(".", "/"): unit for name, unit in units.items()})


def full_name(name: str) -> str:
    return name.replace("/", ".")


def run(units: nn.ModuleDict, scope: Scope, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    x: Any = ids
    for i, (name, unit) in enumerate(units.items()):
        scope.unit = i
        x = unit(x, targets) if name == "loss" else unit(x)
    return x  # type: ignore[no-any-return]


def specs(module: nn.Module) -> dict[str, ShardSpec]:
    return {
        f"{prefix}.{name}": spec
        for prefix, layer in module.named_modules()
        for name, spec in getattr(layer, "shards", {}).items()
    }


def rank_result(
    group: Group, config: DecoderConfig, sequence: bool, parts: tuple[int, ...] = (BATCH,)
) -> dict[str, Any]:
    """Loss, gradients and values of a rank; the batch in microbatches of the given sizes."""
    scope = Scope(tp=group, sequence_parallel=sequence, dtype=F64, seed=11, step=3)
    units = build(config, scope)
    ids, targets = data()
    loss = torch.zeros((), dtype=F64)
    weight = torch.zeros((), dtype=F64)
    for size in parts:
        lo, scope.sample0 = scope.sample0, scope.sample0
        s, w = run(units, scope, ids[lo : lo + size], targets[lo : lo + size])
        s.backward()
        loss, weight = loss + s.detach(), weight + w
        scope.sample0 = lo + size
    reduce_partial_grads(units, scope)
    where = specs(units)
    params = dict(units.named_parameters())
    assert set(where) == set(params)  # every parameter says how it is sharded
    return {
        "loss": loss,
        "weight": weight,
        "grads": {full_name(n): (where[n], p.grad) for n, p in params.items()},
        "values": {full_name(n): (where[n], p.detach()) for n, p in params.items()},
    }


def assemble(ranks: list[dict[str, tuple[ShardSpec, Tensor]]]) -> dict[str, Tensor]:
    out = {}
    for name, (spec, first) in ranks[0].items():
        out[name] = torch.full(spec.global_shape, torch.nan, dtype=first.dtype)
        for spec, part in (rank[name] for rank in ranks):
            at = 0
            for start, stop in spec.slices or ((0, spec.global_shape[0]),):
                dim = spec.dim or 0
                out[name].narrow(dim, start, stop - start).copy_(part.narrow(dim, at, stop - start))
                at += stop - start
            assert spec.dim is not None or torch.equal(part, first), name
    return out


# -- plain PyTorch ----------------------------------------------------------------------------------


def plain_loss(w: dict[str, Tensor], config: DecoderConfig, ids: Tensor, targets: Tensor) -> Tensor:
    """The same decoder, written from the papers with whole weights and explicit softmax attention."""

    def norm(x: Tensor, name: str) -> Tensor:
        if config.norm == "rms":
            return x * (x.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * w[f"{name}.weight"]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), config.norm_eps)

    def dense(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def attention(x: Tensor, name: str) -> Tensor:
        b, s, h = x.shape
        d, groups = config.head_dim, config.heads // config.kv_heads
        qkv = dense(x, f"{name}.qkv")
        q, k, v = qkv.split((config.heads * d, config.kv_heads * d, config.kv_heads * d), -1)  # type: ignore[no-untyped-call]
        q, k, v = (t.view(b, s, -1, d).transpose(1, 2) for t in (q, k, v))
        if config.positions == "rope":
            q, k = turn(q, config), turn(k, config)
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(d)
        scores = scores + torch.full((s, s), -torch.inf, dtype=x.dtype).triu(1)
        return dense((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, h), f"{name}.out")

    def feed_forward(x: Tensor, name: str) -> Tensor:
        y = dense(x, f"{name}.up")
        if config.act != "gelu":
            gate, up = y.chunk(2, -1)
            gate = gate * gate.sigmoid() if config.act == "swiglu" else F.gelu(gate, approximate="tanh")
            return dense(gate * up, f"{name}.down")
        return dense(F.gelu(y, approximate="tanh"), f"{name}.down")

    x = F.embedding(ids, w["embed.tokens.weight"])
    if config.positions == "learned":
        x = x + w["embed.positions.weight"][: ids.shape[1]]
    for i in range(config.layers):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention")
        x = x + feed_forward(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp")
    logits = F.linear(norm(x, "loss.norm"), w["loss.head.weight"])
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def turn(x: Tensor, config: DecoderConfig) -> Tensor:
    """Rotary positions by complex numbers. x: ``[b, heads, s, d]``."""
    s, d = x.shape[-2:]
    angle = torch.outer(torch.arange(s).double(), config.rope_theta ** (-torch.arange(0, d, 2).double() / d))
    z = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", CONFIGS)
def test_one_rank_equals_plain_pytorch(which: str) -> None:
    config = CONFIGS[which]
    (r,) = run_threads(1, lambda g: rank_result(g, config, False))
    w = {n: v.requires_grad_() for n, v in assemble([r["values"]]).items()}
    ids, targets = data()
    loss = plain_loss(w, config, ids, targets)
    loss.backward()
    close(r["loss"], loss.detach())
    assert r["weight"] == (targets != -100).sum()
    for name, (_, grad) in r["grads"].items():
        close(grad, w[name].grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", CONFIGS)
@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("sequence", [False, True])
def test_many_ranks_equal_one(which: str, tp: int, sequence: bool) -> None:
    config = CONFIGS[which]
    (one,) = run_threads(1, lambda g: rank_result(g, config, False))
    many = run_threads(tp, lambda g: rank_result(g, config, sequence))
    compare(one, many)


def compare(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    for r in many:
        close(r["loss"], one["loss"])
        assert r["weight"] == one["weight"]
    values, grads = assemble([r["values"] for r in many]), assemble([r["grads"] for r in many])
    for name, (_, value) in one["values"].items():
        assert torch.equal(values[name], value), name
        close(grads[name], one["grads"][name][1])


@pytest.mark.parametrize("shape", [llama, gpt2])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("parts", [(3,), (1, 2)])
def test_dropout_does_not_depend_on_mesh_or_microbatches(
    shape: Any, tp: int, sequence: bool, parts: tuple[int, ...]
) -> None:
    extra = {"attention_dropout": 0.3} if shape is gpt2 else {}
    config = shape(**SIZES, ffn=72, kv_heads=6, dropout=0.2, **extra)
    (one,) = run_threads(1, lambda g: rank_result(g, config, False))
    (dry,) = run_threads(1, lambda g: rank_result(g, shape(**SIZES, ffn=72, kv_heads=6), False))
    assert abs(one["loss"] - dry["loss"]) > 1e-3  # something was dropped
    compare(one, run_threads(tp, lambda g: rank_result(g, config, sequence, parts)))


def test_attention_dropout_path_equals_fused_where_nothing_falls() -> None:
    units = build(gpt2(**SIZES, ffn=72, kv_heads=6, attention_dropout=1e-13), Scope(dtype=F64))
    attention = units["blocks/0"].attention
    x = torch.randn(2, 12, 48, dtype=F64, generator=torch.Generator().manual_seed(1))
    explicit = attention(x)
    close(explicit, attention.eval()(x))


@pytest.mark.parametrize("sequence", [False, True])
def test_logits_and_weight(sequence: bool) -> None:
    config = CONFIGS["llama gqa"]

    def body(group: Group) -> Tensor:
        scope = Scope(tp=group, sequence_parallel=sequence, dtype=F64, seed=11)
        units = build(config, scope)
        x = ids
        with torch.no_grad():
            for name, unit in units.items():
                x = unit.logits(x) if name == "loss" else unit(x)
        assert units["loss"].weight(targets) == (targets != -100).sum()
        assert units["loss"].weight(torch.full((2, 3), -100)) == 0
        return x

    ids, targets = data()
    one, *_ = run_threads(1, body)
    assert one.shape == (BATCH, LENGTH, 31)
    for r in run_threads(3, body):
        close(r, one)


def test_all_targets_ignored() -> None:
    units = build(CONFIGS["gpt2"], Scope(dtype=F64))
    ids, targets = data()
    s, w = run(units, Scope(), ids, torch.full_like(targets, -100))
    s.backward()
    assert (s.item(), w.item()) == (0.0, 0.0)
    assert all(p.grad is not None and p.grad.eq(0).all() for p in units.parameters())


def test_ties_start_equal_and_names() -> None:
    model = decoder(CONFIGS["gpt2"])
    assert model.ties == (("embed.tokens.weight", "loss.head.weight"),)
    assert decoder(CONFIGS["llama"]).ties == ()
    assert list(model.units) == ["embed", "blocks.0", "blocks.1"]
    tied, apart = (build(CONFIGS[n], Scope()) for n in ("gpt2", "llama"))
    assert torch.equal(tied["embed"].tokens.weight, tied["loss"].head.weight)
    assert not torch.equal(apart["embed"].tokens.weight, apart["loss"].head.weight)


@pytest.mark.parametrize("which", [*CONFIGS, "llama biases"])
def test_number_of_parameters(which: str) -> None:
    config = CONFIGS.get(which, llama(**SIZES, ffn=72, bias=True))
    params = dict(build(config, Scope()).named_parameters())
    if config.tied:
        del params["loss.head.weight"]
    assert config.parameters == sum(p.numel() for p in params.values())


def test_initial_deviations() -> None:
    config = gpt2(vocab=500, hidden=128, layers=8, heads=4)
    block = decoder(config).units["blocks.3"](Scope())
    stds = {n: p.std().item() for n, p in block.named_parameters() if n.endswith("weight") and p.dim() == 2}
    for name, std in stds.items():
        expect = 0.02 / 4 if name in ("attention.out.weight", "mlp.down.weight") else 0.02
        assert abs(std / expect - 1) < 0.03, name


@pytest.mark.parametrize(
    ("config", "tp", "message"),
    [
        (llama(vocab=8, hidden=8, layers=1, heads=4, kv_heads=4, ffn=8), 3, "tp=3 does not divide heads=4"),
        (llama(vocab=8, hidden=8, layers=1, heads=4, kv_heads=2, ffn=8), 4, "tp=4 does not divide kv_heads=2"),
        (llama(vocab=8, hidden=8, layers=1, heads=4, kv_heads=4, ffn=6), 4, "tp=4 does not divide ffn=6"),
    ],
)
def test_meshes_that_do_not_fit(config: DecoderConfig, tp: int, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        run_threads(tp, lambda g: decoder(config).units["blocks.0"](Scope(tp=g)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 50}, "hidden=50 must be a multiple of heads=12"),
        ({"kv_heads": 5}, "heads=12 must be a multiple of kv_heads=5"),
        ({"vocab": 0}, "vocab must be a positive integer, got 0"),
        ({"layers": True}, "layers must be a positive integer, got True"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"hidden": 36}, "even head size"),
    ],
)
def test_configs_that_cannot_work(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llama(**(SIZES | change))
    with pytest.raises(ConfigError, match="act='relu' is not one of swiglu, geglu, gelu"):
        DecoderConfig(vocab=8, hidden=8, layers=1, heads=1, kv_heads=1, ffn=8, max_seq=8, act="relu")


@pytest.mark.parametrize("which", ["llama", "gpt2"])
def test_sequences_that_do_not_fit(which: str) -> None:
    units = build(CONFIGS[which], Scope())
    with pytest.raises(ConfigError, match="17 tokens is longer than the model's max_seq=16"):
        run(units, Scope(), torch.zeros(1, 17, dtype=torch.int64), torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"must be \[batch, sequence\], got shape \(5,\)"):
        units["embed"](torch.zeros(5, dtype=torch.int64))

    def odd(group: Group) -> None:
        build(CONFIGS[which], Scope(tp=group, sequence_parallel=True))["embed"](torch.zeros(1, 5, dtype=torch.int64))

    with pytest.raises(ConfigError, match="tp=2 does not divide the sequence length 5"):
        run_threads(2, odd)
