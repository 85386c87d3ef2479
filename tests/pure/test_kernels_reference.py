"""Reference kernels against torch or the formula in fp64, values and gradients."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from triloom_kernels.cross_entropy import combine_shards, shard_gradient_, shard_softmax, target_logits
from triloom_kernels.gelu import gelu
from triloom_kernels.layer_norm import layer_norm
from triloom_kernels.rms_norm import rms_norm
from triloom_kernels.rope import rope_tables, rotate, split_rotate
from triloom_kernels.swiglu import swiglu

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a: Tensor | None, b: Tensor | None) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (2, 3, 16), (0, 4)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, w, g = randn(*shape).requires_grad_(), randn(shape[-1], seed=1).requires_grad_(), randn(*shape, seed=2)
    y = rms_norm(x, w, 1e-3)
    expect = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * w
    close(y, expect)
    for a, b in zip(torch.autograd.grad(y, (x, w), g), torch.autograd.grad(expect, (x, w), g), strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_of_16_bit_is_computed_in_fp32(dtype: torch.dtype) -> None:
    x, w = randn(4, 64, dtype=dtype).mul_(100).requires_grad_(), randn(64, seed=1, dtype=dtype).requires_grad_()
    y = rms_norm(x, w, 1e-5)
    assert y.dtype == dtype
    expect = F.rms_norm(x.float(), (64,), w.float(), 1e-5).to(dtype)
    assert torch.equal(y, expect) or (y - expect).abs().max() <= torch.finfo(dtype).eps * expect.abs().max()
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, w))
    assert (dx.dtype, dw.dtype) == (dtype, dtype)
    assert dx.isfinite().all()


def test_layer_norm() -> None:
    x, w, b = randn(3, 4, 9), randn(9, seed=1), randn(9, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    close(layer_norm(x, w, b, 1e-3), centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * w + b)
    close(layer_norm(x, w, None, 1e-3) + b, layer_norm(x, w, b, 1e-3))


def test_gelu() -> None:
    x = randn(50) * 3
    close(gelu(x), x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 10), (0, 4)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    x = randn(*shape).requires_grad_()
    gate, up = x.chunk(2, -1)
    expect = gate * torch.sigmoid(gate) * up
    y, g = swiglu(x), randn(*expect.shape, seed=1)
    close(y, expect)
    close(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(expect, x, g)[0])


def test_rope_turns_by_position_times_frequency() -> None:
    cos, sin = rope_tables(9, 6, 100.0, dtype=F64, device=torch.device("cpu"))
    x = randn(9, 6)
    out = torch.empty_like(x)
    rotate(out, x, cos, sin)
    for p in range(9):
        for i in range(3):
            turn = complex(math.cos(p * 100 ** (-2 * i / 6)), math.sin(p * 100 ** (-2 * i / 6)))
            z = complex(x[p, i], x[p, i + 3]) * turn
            assert abs(complex(out[p, i], out[p, i + 3]) - z) < 1e-12
    back = torch.empty_like(x)
    rotate(back, out, cos, sin, inverse=True)
    close(back, x)


def test_rope_scores_depend_on_distance_only() -> None:
    cos, sin = rope_tables(20, 8, 10000.0, dtype=F64, device=torch.device("cpu"))
    q, k = torch.empty(20, 8, dtype=F64), torch.empty(20, 8, dtype=F64)
    rotate(q, randn(1, 8).expand(20, 8), cos, sin)
    rotate(k, randn(1, 8, seed=1).expand(20, 8), cos, sin)
    scores = q @ k.t()
    for d in range(-19, 20):
        diagonal = scores.diagonal(d)
        close(diagonal, diagonal[:1].expand_as(diagonal))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_split_rotate(heads: int, kv_heads: int) -> None:
    b, s, d = 2, 5, 6
    cos, sin = (t.view(1, s, 1, 3) for t in rope_tables(s, d, 50.0, dtype=F64, device=torch.device("cpu")))
    qkv = randn(b, s, (heads + 2 * kv_heads) * d).requires_grad_()

    def plain(x: Tensor) -> Tensor:
        u, v = x.chunk(2, -1)
        return torch.cat((u * cos - v * sin, v * cos + u * sin), -1)

    q, k, v = qkv.view(b, s, -1, d).split((heads, kv_heads, kv_heads), 2)  # type: ignore[no-untyped-call]
    expect = plain(q), plain(k), v
    got = split_rotate(qkv, cos, sin, heads, kv_heads)
    grads = [randn(*t.shape, seed=i).transpose(0, 1).contiguous().transpose(0, 1) for i, t in enumerate(expect)]
    for a, e in zip(got, expect, strict=True):
        close(a, e)
    close(torch.autograd.grad(got, qkv, grads)[0], torch.autograd.grad(expect, qkv, grads)[0])
    only_q = torch.autograd.grad(split_rotate(qkv, cos, sin, heads, kv_heads)[0], qkv, grads[0])[0]
    assert only_q.view(b, s, -1, d)[:, :, heads:].eq(0).all()


def test_rotation_of_16_bit_is_rounded_once() -> None:
    cos, sin = rope_tables(5, 8, 50.0, dtype=torch.float32, device=torch.device("cpu"))
    x = randn(5, 8, dtype=torch.bfloat16)
    out, wide = torch.empty_like(x), torch.empty(5, 8)
    rotate(out, x, cos, sin)
    rotate(wide, x.float(), cos, sin)
    assert torch.equal(out, wide.bfloat16())


@pytest.mark.parametrize("bounds", [(0, 11), (0, 4, 11), (0, 5, 5, 11)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_parts(bounds: tuple[int, ...], scale: float) -> None:
    x, t = randn(6, 11) * scale, torch.tensor([0, 4, 5, 10, 3, 7])
    shards = [(x[:, a:b].clone(), a, b) for a, b in itertools.pairwise(bounds)]
    held = [(t >= a) & (t < b) for _, a, b in shards]
    index = [(t - a).masked_fill(~h, 0).unsqueeze(1) for (_, a, _), h in zip(shards, held, strict=True)]
    found = [target_logits(p, i).masked_fill(~h, 0) for (p, _, _), i, h in zip(shards, index, held, strict=True)]
    tops = [shard_softmax(p, p, guard=len(shards) > 1) for p, _, _ in shards]
    largest, log_top = (torch.stack(v) for v in zip(*tops, strict=True))
    m, minus_log_z = combine_shards(largest, log_top)
    loss = m - sum(found) - minus_log_z
    close(loss, F.cross_entropy(x, t, reduction="none"))
    weight = torch.linspace(0.5, 1, 6, dtype=F64)
    grads = [
        shard_gradient_(p, weight * (la - m - lt + minus_log_z).exp(), i, weight * h)
        for (p, _, _), (la, lt), i, h in zip(shards, tops, index, held, strict=True)
    ]
    leaf = x.clone().requires_grad_()
    (F.cross_entropy(leaf, t, reduction="none") * weight).sum().backward()
    close(torch.cat(grads, 1), leaf.grad)


def test_guard_makes_rows_of_minus_infinity_zero() -> None:
    x = torch.full((2, 3), -torch.inf)
    x[1, 1] = 2.0
    largest, log_top = shard_softmax(x, x, guard=True)
    assert x.tolist() == [[0, 0, 0], [0, 1, 0]]
    assert largest.tolist() == [-torch.inf, 2.0]
    assert log_top.tolist() == [0.0, 0.0]
