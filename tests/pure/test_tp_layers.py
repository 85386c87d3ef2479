"""Tensor-parallel layers on ranks as threads, against the dense torch operation."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tp_cases import F64, Pair, assemble, chunk, close, gated, grads_of, randn, run_pair, values_of
from triloom.errors import ConfigError, MeshError, TriloomError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.scope import Scope
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
    reduce_from_tp,
    reduce_partial_grads,
    reduce_scatter_to_sequence,
    scatter_to_sequence,
    unscatter_from_sequence,
)
from triloom.tp.weights import product_writer, row_sum_writer

TP = pytest.mark.parametrize("tp", [1, 2, 3, 4])
SEQUENCE = pytest.mark.parametrize("sequence", [False, True])


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
    out = randn(5, 7, seed=9, dtype=torch.float32)
    expect = out + torch.mm(g.t(), x)
    product_writer(g, x)(out, True)
    assert torch.equal(out, expect)
    bias = torch.zeros(5)
    row_sum_writer(g)(bias, False)
    torch.testing.assert_close(bias, g.float().sum(0))
    assert weight.dtype == torch.bfloat16


def test_accumulates_in_place_without_a_temporary() -> None:
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
            assert torch.equal(value, many[name]), name


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
