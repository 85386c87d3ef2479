"""Tensor-parallel layers on ranks as threads, against the dense torch operation."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triloom.errors import ConfigError, MeshError, TriloomError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.scope import Scope
from triloom.shards import ShardSpec
from triloom.tp import (
    ColumnParallelLinear,
    Dropout,
    HeadDropout,
    LayerNorm,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tp,
    gather_from_sequence,
    gather_vocab,
    reduce_from_tp,
    reduce_partial_grads,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    unscatter_from_sequence,
    vocab_parallel_cross_entropy,
)

F64 = torch.float64
TP = pytest.mark.parametrize("tp", [1, 2, 3, 4])
SEQUENCE = pytest.mark.parametrize("sequence", [False, True])


class Sink:
    """A weight-gradient sink that runs closures at once, or keeps them."""

    def __init__(self, params: list[nn.Parameter], immediate: bool, dtype: torch.dtype | None = None) -> None:
        self.immediate = immediate
        self.out = {id(p): torch.full_like(p, torch.nan, dtype=dtype or p.dtype) for p in params}
        self.fresh = set(self.out)
        self.kept: list[Callable[[], None]] = []

    def add(self, param: nn.Parameter, write: Callable[[Tensor, bool], None]) -> None:
        def run() -> None:
            write(self.out[id(param)], id(param) not in self.fresh)
            self.fresh.discard(id(param))

        run() if self.immediate else self.kept.append(run)

    def flush(self) -> None:
        while self.kept:
            self.kept.pop(0)()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def place(out: Tensor, spec: ShardSpec, part: Tensor) -> None:
    """Put a rank's part where it belongs in the global tensor."""
    if spec.dim is None:
        out.copy_(part)
        return
    at = 0
    for start, stop in spec.slices:
        out.narrow(spec.dim, start, stop - start).copy_(part.narrow(spec.dim, at, stop - start))
        at += stop - start


def assemble(results: list[dict[str, tuple[ShardSpec, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors by name from every rank's ``(spec, part)``; every element must be covered."""
    out = {}
    for name, (spec, part) in results[0].items():
        out[name] = torch.full(spec.global_shape, torch.nan, dtype=part.dtype)
        for rank in results:
            place(out[name], *rank[name])
        if spec.dim is None:
            assert all(torch.equal(rank[name][1], part) for rank in results), name
    return out


def specs(module: nn.Module) -> dict[str, ShardSpec]:
    return {
        f"{prefix}.{name}".lstrip("."): spec
        for prefix, layer in module.named_modules()
        for name, spec in getattr(layer, "shards", {}).items()
    }


def grads_of(module: nn.Module) -> dict[str, tuple[ShardSpec, Tensor]]:
    params = dict(module.named_parameters())
    return {name: (spec, params[name].grad) for name, spec in specs(module).items()}  # type: ignore[misc]


def values_of(module: nn.Module) -> dict[str, tuple[ShardSpec, Tensor]]:
    params = dict(module.named_parameters())
    return {name: (spec, params[name].detach()) for name, spec in specs(module).items()}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def chunk(x: Tensor, group: Group, sequence: bool) -> Tensor:
    return x.chunk(group.size)[group.rank] if sequence and group.size > 1 else x


# -- linear pairs -----------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self, scope: Scope, bias: bool = True) -> None:
        super().__init__()
        self.up = ColumnParallelLinear(8, 48, scope=scope, name="up", parts=(24, 24), bias=bias, std=0.5)
        self.down = RowParallelLinear(24, 8, scope=scope, name="down", bias=bias, std=0.5)
        for p in (self.up.bias, self.down.bias):
            if p is not None:
                p.data.copy_(torch.linspace(1, 2, p.numel()))  # not zero, and the row bias equal on all ranks

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(gated(self.up(x)))
        return out


def gated(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return a * torch.tanh(b)


def run_pair(
    group: Group, sequence: bool, bias: bool = True, sink: str = "none", passes: int = 1, dtype: torch.dtype = F64
) -> dict[str, Any]:
    scope = Scope(tp=group, sequence_parallel=sequence, dtype=dtype)
    pair = Pair(scope, bias)
    params = list(pair.parameters())
    keeper = None if sink == "none" else Sink(params, sink == "immediate", torch.float32 if dtype != F64 else None)
    scope.grads = keeper
    x = chunk(randn(12, 3, 8, dtype=dtype), group, sequence).requires_grad_()
    g = chunk(randn(12, 3, 8, seed=1, dtype=dtype), group, sequence)
    for _ in range(passes):
        y = pair(x)
        scope.grads = None  # the sink counts at the forward
        y.backward(g)
        scope.grads = keeper
    if keeper is not None:
        keeper.flush()
        assert all(p.grad is None for p in params)
        for p in params:
            p.grad = keeper.out[id(p)].to(p.dtype)
    raw = {name: p.grad.clone() for name, p in pair.named_parameters()}  # type: ignore[union-attr]
    reduce_partial_grads(pair, scope)
    return {"y": y.detach(), "dx": x.grad, "raw": raw, "grads": grads_of(pair), "values": values_of(pair)}


@TP
@SEQUENCE
@pytest.mark.parametrize("bias", [False, True])
def test_pair_equals_dense(tp: int, sequence: bool, bias: bool) -> None:
    ranks = run_threads(tp, lambda g: run_pair(g, sequence, bias))
    w = {k: v.requires_grad_() for k, v in assemble([r["values"] for r in ranks]).items()}
    x = randn(12, 3, 8).requires_grad_()
    y = F.linear(gated(F.linear(x, w["up.weight"], w.get("up.bias"))), w["down.weight"], w.get("down.bias"))
    y.backward(randn(12, 3, 8, seed=1))
    split = sequence and tp > 1
    close(torch.cat([r["y"] for r in ranks]) if split else ranks[-1]["y"], y.detach())
    close(torch.cat([r["dx"] for r in ranks]) if split else ranks[-1]["dx"], x.grad)  # type: ignore[arg-type]
    found = assemble([r["grads"] for r in ranks])
    assert set(found) == set(w)
    for name, grad in found.items():
        close(grad, w[name].grad)  # type: ignore[arg-type]


@TP
@SEQUENCE
def test_deferred_equals_immediate_bitwise(tp: int, sequence: bool) -> None:
    runs = [run_threads(tp, lambda g, s=s: run_pair(g, sequence, sink=s)) for s in ("none", "immediate", "deferred")]
    for plain, now, later in zip(*runs, strict=True):
        for name, grad in plain["raw"].items():
            assert torch.equal(grad, now["raw"][name]), name
            assert torch.equal(grad, later["raw"][name]), name
        assert torch.equal(plain["dx"], now["dx"])
        assert torch.equal(plain["dx"], later["dx"])


@pytest.mark.parametrize("sink", ["immediate", "deferred"])
def test_accumulates_over_passes(sink: str) -> None:
    once = run_threads(2, lambda g: run_pair(g, True, sink=sink))
    thrice = run_threads(2, lambda g: run_pair(g, True, sink=sink, passes=3))
    for a, b in zip(once, thrice, strict=True):
        for name, grad in a["raw"].items():
            close(b["raw"][name], 3 * grad)


def test_bf16_gradients_accumulate_in_fp32() -> None:
    weight, x, g = (randn(*s, seed=i, dtype=torch.bfloat16) for i, s in enumerate(((5, 7), (11, 7), (11, 5))))
    from triloom.tp.weights import product_writer, row_sum_writer

    out = randn(5, 7, seed=9, dtype=torch.float32)
    expect = out + torch.mm(g.t(), x)
    product_writer(g, x)(out, True)
    assert torch.equal(out, expect)
    bias = torch.zeros(5)
    row_sum_writer(g)(bias, False)
    torch.testing.assert_close(bias, g.float().sum(0))
    assert weight.dtype == torch.bfloat16


def test_accumulates_in_place_without_a_temporary() -> None:
    from triloom.tp.weights import product_writer

    flat = torch.zeros(100, dtype=F64)
    out = flat[10:45].view(5, 7)
    g, x = randn(11, 5), randn(11, 7, seed=1)
    product_writer(g, x)(out, False)
    product_writer(g, x)(out, True)
    close(out, 2 * g.t() @ x)
    assert flat[:10].eq(0).all()
    assert flat[45:].eq(0).all()


def test_frozen_weight_and_leaf_input() -> None:
    def body(group: Group) -> None:
        scope = Scope(tp=group, dtype=F64)
        pair = Pair(scope)
        pair.up.weight.requires_grad_(False)
        x = randn(4, 2, 8)
        pair(x).sum().backward()
        assert pair.up.weight.grad is None
        assert pair.down.weight.grad is not None
        frozen = Pair(scope).requires_grad_(False)
        x.requires_grad_()
        frozen(x).sum().backward()
        assert x.grad is not None

    run_threads(2, body)


def test_second_derivative_is_refused() -> None:
    pair = Pair(Scope(dtype=F64))
    x = randn(2, 8).requires_grad_()
    with pytest.raises(TriloomError, match="twice"):
        torch.autograd.grad(pair(x).sum(), x, create_graph=True)


def test_strided_input_and_gradient() -> None:
    pair = Pair(Scope(dtype=F64))
    x = randn(3, 5, 8).transpose(0, 1).requires_grad_()
    y = pair(x)
    y.transpose(0, 1).pow(2).sum().backward()
    z = x.detach().clone().requires_grad_()
    F.linear(gated(F.linear(z, pair.up.weight, pair.up.bias)), pair.down.weight, pair.down.bias).pow(2).sum().backward()
    close(x.grad, z.grad)  # type: ignore[arg-type]


def test_sizes_that_do_not_fit() -> None:
    def column(group: Group) -> None:
        ColumnParallelLinear(8, 10, scope=Scope(tp=group), name="q", parts=(6, 4))

    with pytest.raises(MeshError, match=r"tp=4 does not divide outputs of q=6"):
        run_threads(4, column)
    with pytest.raises(MeshError, match=r"tp=3 does not divide inputs of o=8"):
        run_threads(3, lambda g: RowParallelLinear(8, 8, scope=Scope(tp=g), name="o"))
    with pytest.raises(ConfigError, match=r"sum to 9, not to out_features=10"):
        ColumnParallelLinear(8, 10, scope=Scope(), name="q", parts=(6, 3))

    def odd(group: Group) -> None:
        layer = RowParallelLinear(8, 8, scope=Scope(tp=group, sequence_parallel=True), name="o")
        layer(torch.zeros(5, 1, 4))

    with pytest.raises(ConfigError, match=r"tp=2 does not divide the sequence length 5; use a length of 4 or 6"):
        run_threads(2, odd)


# -- initial values ---------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self, scope: Scope) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(13, 8, scope=scope, name="embed")
        self.pair = Pair(scope)
        self.norm = LayerNorm(8, scope=scope, name="norm")
        self.rms = RMSNorm(8, scope=scope, name="rms")
        self.head = ColumnParallelLinear(8, 13, scope=scope, name="head", bias=False, uneven=True)


@SEQUENCE
def test_initial_values_do_not_depend_on_the_mesh(sequence: bool) -> None:
    one = assemble(run_threads(1, lambda g: values_of(Everything(Scope(tp=g, seed=3)))))
    other = assemble(run_threads(1, lambda g: values_of(Everything(Scope(tp=g, seed=4)))))
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert not torch.equal(one["embed.weight"], one["head.weight"])
    for tp in (2, 3, 4):
        make = lambda g: values_of(Everything(Scope(tp=g, seed=3, sequence_parallel=sequence)))  # noqa: E731
        many = assemble(run_threads(tp, make))
        for name, value in one.items():
            if not name.endswith("up.bias"):  # set by Pair, by local position
                assert torch.equal(value, many[name]), name


# -- embedding --------------------------------------------------------------------------------------


@TP
@SEQUENCE
@pytest.mark.parametrize("vocab", [2, 13])
@pytest.mark.parametrize("sink", ["none", "immediate", "deferred"])
def test_embedding_equals_dense(tp: int, sequence: bool, vocab: int, sink: str) -> None:
    ids = randint(vocab, 12, 3)

    def body(group: Group) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
        scope = Scope(tp=group, sequence_parallel=sequence, dtype=F64)
        layer = VocabParallelEmbedding(vocab, 6, scope=scope, name="e")
        keeper = None if sink == "none" else Sink([layer.weight], sink == "immediate")
        scope.grads = keeper
        for _ in range(1 if keeper is None else 2):
            y = layer(ids)
            y.backward(chunk(randn(12, 3, 6), group, sequence))
        if keeper is not None:
            keeper.flush()
            layer.weight.grad = keeper.out[id(layer.weight)] / 2
        return y.detach(), values_of(layer), grads_of(layer)

    ranks = run_threads(tp, body)
    w = assemble([r[1] for r in ranks])["weight"].requires_grad_()
    y = F.embedding(ids, w)
    y.backward(randn(12, 3, 6))
    assert torch.equal(torch.cat([r[0] for r in ranks]) if sequence and tp > 1 else ranks[0][0], y.detach())
    close(assemble([r[2] for r in ranks])["weight"], w.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 13])
def test_id_outside_the_vocabulary(bad: int) -> None:
    def body(group: Group) -> None:
        VocabParallelEmbedding(13, 6, scope=Scope(tp=group), name="e")(torch.tensor([[3, bad]]))

    for tp in (1, 2):
        with pytest.raises(ConfigError, match=rf"token id {bad} on rank . of 'world' is outside.*0\.\.12"):
            run_threads(tp, body)


# -- cross-entropy ----------------------------------------------------------------------------------

LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: 3 * x,
    "huge": lambda x: 1e4 * x.sign() + x,
    "some -inf": lambda x: x.masked_fill(x < -0.5, -torch.inf),
    "a shard of -inf": lambda x: x.index_fill(1, torch.arange(7), -torch.inf),
}
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda t: t,
    "some": lambda t: t.masked_fill(t % 3 == 0, -100),
    "none": lambda t: t.fill_(-100),
}


def run_loss(group: Group, logits: Tensor, targets: Tensor, in_place: bool) -> tuple[Tensor, ...]:
    from triloom.shards import split_even

    start, stop = split_even(logits.shape[-1], group.size)[group.rank]
    leaf = logits[:, start:stop].clone().requires_grad_()
    given = leaf.clone()  # what a head would give: not a leaf, read by nobody else
    loss, weight = vocab_parallel_cross_entropy(given, targets, group=group, vocab=logits.shape[-1], in_place=in_place)
    (loss * 0.7).backward()
    assert leaf.grad is not None
    if not in_place:
        assert torch.equal(given.detach(), leaf.detach())
    return loss.detach(), weight, leaf.grad


@TP
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("which", TARGETS)
@pytest.mark.parametrize("in_place", [False, True])
def test_cross_entropy_equals_dense(tp: int, kind: str, which: str, in_place: bool) -> None:
    logits = LOGITS[kind](randn(20, 13))
    targets = TARGETS[which](randint(6, 20) + 7)
    ranks = run_threads(tp, lambda g: run_loss(g, logits, targets, in_place))
    dense = logits.clone().requires_grad_()
    loss = F.cross_entropy(dense, targets, reduction="sum")
    (loss * 0.7).backward()
    for r in ranks:
        close(r[0], loss.detach())
        assert r[1] == (targets != -100).sum()
        assert torch.equal(r[0], ranks[0][0])
    close(torch.cat([r[2] for r in ranks], 1), dense.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("tp", [3, 4])
def test_cross_entropy_with_empty_shards(tp: int) -> None:
    logits, targets = randn(2, 5, 2), randint(2, 2, 5)
    ranks = run_threads(tp, lambda g: run_loss(g, logits.view(10, 2), targets.view(10), True))
    close(ranks[0][0], F.cross_entropy(logits.view(10, 2), targets.view(10), reduction="sum"))


def test_cross_entropy_of_16_bit_logits() -> None:
    logits, targets = randn(20, 13, dtype=torch.bfloat16), randint(13, 20)
    ranks = run_threads(2, lambda g: run_loss(g, logits, targets, True))
    dense = logits.float().requires_grad_()
    loss = F.cross_entropy(dense, targets, reduction="sum")
    (loss * 0.7).backward()
    torch.testing.assert_close(ranks[0][0], loss.detach())
    assert ranks[0][2].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat([r[2] for r in ranks], 1), dense.grad.bfloat16())  # type: ignore[union-attr]


def test_cross_entropy_refuses() -> None:
    for tp in (1, 2):
        with pytest.raises(ConfigError, match=r"target 13 on rank . .*0\.\.12 or -100 \(ignored\)"):
            run_threads(tp, lambda g: run_loss(g, randn(2, 13), torch.tensor([-100, 13]), True))
        with pytest.raises(ConfigError, match=r"target -3 on rank"):
            run_threads(tp, lambda g: run_loss(g, randn(2, 13), torch.tensor([-3, 1]), True))
    x = randn(4, 13).requires_grad_()
    loss, _ = vocab_parallel_cross_entropy(x, randint(13, 4), group=Scope().tp, vocab=13)
    loss.backward(retain_graph=True)
    with pytest.raises(TriloomError, match="already holds the gradient"):
        loss.backward()


@TP
def test_gather_vocab(tp: int) -> None:
    from triloom.shards import split_even

    x = randn(2, 3, 5)
    got = run_threads(tp, lambda g: gather_vocab(x[..., slice(*split_even(5, tp)[g.rank])].contiguous(), 5, g))
    assert all(torch.equal(y, x) for y in got)


# -- norms, dropout, communication ------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("layer", [RMSNorm, LayerNorm])
def test_norm_gradients_are_partial_over_the_sequence(tp: int, layer: Any) -> None:
    def body(group: Group) -> tuple[Tensor, dict[str, Any]]:
        scope = Scope(tp=group, sequence_parallel=True, dtype=F64)
        norm = layer(8, scope=scope, name="n")
        x = chunk(randn(6, 2, 8), group, True).requires_grad_()
        norm(x).backward(chunk(randn(6, 2, 8, seed=1), group, True))
        reduce_partial_grads(norm, scope)
        assert all(s.partial_grad == (tp > 1) for s in norm.shards.values())
        return x.grad, grads_of(norm)  # type: ignore[return-value]

    ranks = run_threads(tp, body)
    x, w, b = randn(6, 2, 8).requires_grad_(), torch.ones(8, dtype=F64).requires_grad_(), torch.zeros(8, dtype=F64)
    b.requires_grad_()
    y = F.rms_norm(x, (8,), w, 1e-5) if layer is RMSNorm else F.layer_norm(x, (8,), w, b, 1e-5)
    y.backward(randn(6, 2, 8, seed=1))
    found = assemble([r[1] for r in ranks])
    close(torch.cat([r[0] for r in ranks]), x.grad)  # type: ignore[arg-type]
    close(found["weight"], w.grad)  # type: ignore[arg-type]
    if layer is LayerNorm:
        close(found["bias"], b.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("tp", [1, 2, 3])
@SEQUENCE
@pytest.mark.parametrize("cuts", [(0, 4), (0, 1, 4)])
def test_dropout_does_not_depend_on_the_mesh(tp: int, sequence: bool, cuts: tuple[int, ...]) -> None:
    whole_scope = Scope(seed=5, step=7, unit=2)
    x = torch.ones(4, 6, 5)
    expect = Dropout(0.5, scope=whole_scope, site="a")(x)
    assert 0 < expect.count_nonzero() < expect.numel()
    assert expect.unique().tolist() == [0.0, 2.0]

    def body(group: Group) -> Tensor:
        scope = Scope(tp=group, sequence_parallel=sequence, seed=5, step=7, unit=2)
        drop, out = Dropout(0.5, scope=scope, site="a"), []
        for lo, hi in itertools.pairwise(cuts):
            scope.sample0 = lo
            part = x[lo:hi].transpose(0, 1) if sequence and tp > 1 else x[lo:hi]
            y = drop(chunk(part, group, sequence))
            out.append(y.transpose(0, 1) if sequence and tp > 1 else y)
        return torch.cat(out)

    ranks = run_threads(tp, body)
    got = torch.cat(ranks, 1) if sequence and tp > 1 else ranks[-1]
    assert torch.equal(got, expect)


def test_dropout_keys() -> None:
    x = torch.ones(2, 3, 50)
    scope = Scope(seed=1)
    a, b = Dropout(0.3, scope=scope, site="a"), Dropout(0.3, scope=scope, site="b")
    first = a(x)
    assert torch.equal(first, a(x))
    assert not torch.equal(first, b(x))
    for field in ("seed", "step", "unit"):
        other = Scope(**({"seed": 1} | {field: 9}))  # type: ignore[arg-type]
        assert not torch.equal(first, Dropout(0.3, scope=other, site="a")(x)), field
    assert a.eval()(x) is x
    with pytest.raises(ConfigError, match=r"'a' must be in \[0, 1\), got 1.0"):
        Dropout(1.0, scope=scope, site="a")


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_head_dropout_does_not_depend_on_the_mesh(tp: int) -> None:
    x = torch.ones(2, 6, 4, 4)
    expect = HeadDropout(0.5, scope=Scope(), site="p", heads=6)(x)
    got = run_threads(tp, lambda g: HeadDropout(0.5, scope=Scope(tp=g), site="p", heads=6)(x.chunk(tp, 1)[g.rank]))
    assert torch.equal(torch.cat(got, 1), expect)
    late = HeadDropout(0.5, scope=Scope(sample0=1), site="p", heads=6)(x[1:])
    assert torch.equal(late, expect[1:])


@pytest.mark.parametrize(
    ("fn", "spread_in", "spread_out"),
    [
        (copy_to_tp, False, False),
        (reduce_from_tp, False, False),
        (scatter_to_sequence, False, True),
        (gather_from_sequence, True, False),
        (reduce_scatter_to_sequence, False, True),
        (unscatter_from_sequence, True, False),
    ],
)
def test_communication_and_its_adjoint(fn: Any, spread_in: bool, spread_out: bool) -> None:
    """Forward against its definition; and where inputs differ by rank, <f(x), g> summed = <x, f*(g)> summed."""
    tp = 3

    def body(group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = randn(2 if spread_in else 6, 4, seed=group.rank).requires_grad_()
        y = fn(x, group)
        g = randn(*y.shape, seed=10 + group.rank)
        y.backward(g)
        return x.detach(), y.detach(), g, x.grad  # type: ignore[return-value]

    xs, ys, gs, dxs = zip(*run_threads(tp, body), strict=True)
    total = sum(xs)
    forward = {
        copy_to_tp: lambda r: xs[r],
        reduce_from_tp: lambda r: total,
        scatter_to_sequence: lambda r: xs[r].chunk(tp)[r],
        gather_from_sequence: lambda r: torch.cat(xs),
        reduce_scatter_to_sequence: lambda r: total.chunk(tp)[r],  # type: ignore[union-attr]
        unscatter_from_sequence: lambda r: torch.cat(xs),
    }[fn]
    backward = {
        copy_to_tp: lambda r: sum(gs),
        reduce_from_tp: lambda r: gs[r],
        scatter_to_sequence: lambda r: torch.cat(gs),
        gather_from_sequence: lambda r: sum(gs).chunk(tp)[r],  # type: ignore[union-attr]
        reduce_scatter_to_sequence: lambda r: torch.cat(gs),
        unscatter_from_sequence: lambda r: gs[r].chunk(tp)[r],
    }[fn]
    for r in range(tp):
        close(ys[r], forward(r))
        close(dxs[r], backward(r))
    x = randn(3, 2).requires_grad_()
    assert fn(x, Scope().tp) is x  # one rank: no node, no cost
