"""Optimizers, sums and packed forms on flat tensors: the bits of the eager operations, and those against fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triloom_kernels import adamw, flat_adamw, ordered_sums, packed, packing, sums, weight_product
from triloom_kernels.adamw import BLOCK

from .common import TOLERANCE, CubinCase, draw, near, poisoned

SIZES = (0, 1, 17, 64, 65, 127, 129, 1000)
"""Flat lengths."""
BLOCKS = (1, 3, 17)


def numbers(step: int = 3, lr: float = 1e-2, weight_decay: float = 0.1) -> tuple[float, ...]:
    beta1, beta2 = 0.9, 0.95
    return (
        0.7, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), 1e-8,
    )  # fmt: skip


def tables(device: str) -> Tensor:
    """Some rising numbers for 256 codes, and the bounds between them: signed, unsigned."""
    rising = torch.arange(256, dtype=torch.float64) / 255
    rows = []
    for numbers_ in (rising * 2 - 1, rising):
        rows += [numbers_, torch.cat([(numbers_[1:] + numbers_[:-1]) / 2, torch.zeros(1, dtype=torch.float64)])]
    return torch.stack(rows).float().to(device)


def exact_sqrt(x: Tensor) -> Tensor:
    """fp32, correctly rounded: of fp64's root, which has more than twice the digits."""
    return x.double().sqrt().float()


def check_adamw(n: int, grad: torch.dtype, low: torch.dtype | None, device: str, *, seed: int = 0) -> None:
    """Three updates: the bits of the eager ones, which are near those in fp64; gradients of zero, huge and tiny too."""
    states = [draw(n, seed=seed + i, dtype=torch.float32, device=device) for i in range(3)]
    states[2].square_()
    wide = [t.double() for t in states]
    mine, theirs = [t.clone() for t in states], [t.clone() for t in states]
    copies = [None if low is None else torch.empty(n, dtype=low, device=device) for _ in range(2)]
    for step in range(1, 4):
        g = draw(n, seed=seed + 10 + step, dtype=grad, device=device)
        for at, value in ((0, 0.0), (3, 1e4), (5, 1e-7)):
            if n > at:
                g[at] = value
        with poisoned():
            flat_adamw.adamw_(mine[0], g, mine[1], mine[2], numbers(step), copies[0])
        adamw.adamw_(theirs[0], g, theirs[1], theirs[2], numbers(step), copies[1], sqrt=exact_sqrt)
        adamw.adamw_(wide[0], g, wide[1], wide[2], numbers(step))
    for a, b, w in zip(mine, theirs, wide, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), w, rtol=2e-5, atol=1e-6)
    if low is not None:
        assert torch.equal(copies[0], copies[1])


def check_adamw8(blocks: int, grad: torch.dtype, device: str, *, seed: int = 0) -> None:
    """Codes of every value, a block of zeros, and a first step from nothing."""
    n = blocks * BLOCK
    gen = torch.Generator().manual_seed(seed + blocks)
    states = [
        draw(n, seed=seed + 1, dtype=torch.float32),
        torch.randint(256, (n,), generator=gen, dtype=torch.uint8),
        torch.rand(blocks, generator=gen),
        torch.randint(256, (n,), generator=gen, dtype=torch.uint8),
        torch.rand(blocks, generator=gen),
    ]
    states[2][0] = states[4][0] = 0.0
    g = draw(n, seed=seed + 2, dtype=grad, device=device)
    g[: BLOCK // 2] = 0
    mine, theirs = ([t.to(device, copy=True) for t in states] for _ in range(2))
    with poisoned():
        flat_adamw.adamw8_(mine[0], g, *mine[1:], numbers(), tables(device))
    adamw.adamw8_(theirs[0], g, *theirs[1:], numbers(), tables(device), sqrt=exact_sqrt)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)


def check_square_sums(n: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    x = draw(n, seed=seed + n, dtype=dtype, device=device, scale=30)
    with poisoned():
        got = ordered_sums.square_sums(x)
    assert torch.equal(got, sums.square_sums(x))
    torch.testing.assert_close(got.sum(), x.double().square().sum(), rtol=1e-13, atol=0)
    if n and dtype == torch.float32:
        assert ordered_sums.square_sums(x * 0 + 3e38).isfinite().all()
        for strange in (math.inf, -math.inf, math.nan):
            x[n // 2] = strange
            finite = ordered_sums.square_sums(x).isfinite()
            assert finite.logical_not().nonzero().flatten().tolist() == [n // 2 // sums.BLOCK]


def check_rank_sum(ranks: int, n: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    parts = draw(ranks, n, seed=seed + ranks, dtype=dtype, device=device)
    for out_dtype in (dtype, torch.float32):
        for accumulate in (False, True):
            one, other = (draw(n, seed=seed + 7, dtype=out_dtype, device=device) for _ in range(2))
            with poisoned():
                ordered_sums.rank_sum_(one, parts, accumulate=accumulate)
            assert torch.equal(one, sums.rank_sum_(other, parts, accumulate=accumulate))
    folded = parts[0].float()
    for part in parts[1:]:
        folded = folded + part.float()
    assert torch.equal(sums.rank_sum_(torch.empty(n, device=device), parts), folded)


def check_pack(dtype: torch.dtype, bucket: torch.dtype, device: str, *, seed: int = 0) -> None:
    """Tensors of many shapes, empty ones too; adding back what was packed."""
    shapes = [(3, 5), (0,), (300,), (1,), (7, 11), (2, 0, 3), (257,)]
    tensors = [draw(*s, seed=seed + i, dtype=dtype, device=device) for i, s in enumerate(shapes)]
    n = sum(t.numel() for t in tensors)
    with poisoned():
        got = packed.pack_(torch.empty(n, dtype=bucket, device=device), tensors, 0.3)
    assert torch.equal(got, packing.pack_(torch.empty_like(got), tensors, 0.3))
    mine, theirs = ([t.clone() for t in tensors] for _ in range(2))
    packed.unpack_add_(mine, got, 0.7)
    packing.unpack_add_(theirs, got, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    packed.pack_(torch.empty(0, dtype=bucket, device=device), tensors[1:2])


def check_quantise(block: int, blocks: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    """The bits of the eager codes; what is decoded is within half a step; blocks of zeros, with nan and with inf."""
    n = block * blocks
    x = draw(3, n, seed=seed + block, dtype=dtype, device=device, scale=10)
    x[1, :block] = 0
    with poisoned():
        words = packed.quantise(x, block)
    assert torch.equal(words, packing.quantise(x, block))
    one, other = (torch.empty(n, device=device) for _ in range(2))
    with poisoned():
        packed.dequantise_sum_(one, words, block)
    assert torch.equal(one, packing.dequantise_sum_(other, words, block))
    steps = x.double().view(3, -1, block).abs().amax(-1) / 127
    wrong = (one.double() - x.double().sum(0)).view(-1, block).abs().amax(-1)
    assert (wrong <= steps.sum(0) * 0.5001).all()
    x[0, 0], x[2, n - 1] = math.inf, math.nan
    words = packed.quantise(x, block)
    assert torch.equal(words, packing.quantise(x, block))
    decoded = packed.dequantise_sum_(one, words, block)
    assert not decoded[0].isfinite() and not decoded[-1].isfinite()


def check_largest(rows: int, n: int, count: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    """The same choice as the eager one; what is packed and what is left make up the whole; the sum of the rows."""
    x, left = (draw(rows, n, seed=seed + s, dtype=dtype, device=device) for s in (1, 2))
    (words, rest), (words_, rest_) = packed.take_largest(x, left, count), packing.take_largest(x, left, count)
    assert torch.equal(words, words_)
    assert torch.equal(rest, rest_)
    one, other = (torch.empty(n, dtype=dtype, device=device) for _ in range(2))
    with poisoned():
        packed.add_taken_(one, words)
    assert torch.equal(one, packing.add_taken_(other, words))
    torch.testing.assert_close(one + rest.sum(0), (x + left).sum(0))
    assert (rest.abs().amax(1) <= (x + left).abs().sort(dim=1, descending=True).values[:, count - 1]).all()


def check_weight_product(n: int, v: int, h: int, dtype: torch.dtype, device: str, *, seed: int = 0) -> None:
    """Against fp64, from an accumulator that is not zero; rows apart."""
    grad, x = (
        draw(n, v + 3, seed=seed + 1, dtype=dtype, device=device)[:, :v],
        draw(n, h, seed=seed + 2, dtype=dtype, device=device),
    )
    out = draw(v, h, seed=seed + 3, dtype=torch.float32, device=device)
    wanted = out.double() + grad.double().t() @ x.double()
    weight_product.add_product_(out, grad, x)
    near(out, wanted, TOLERANCE[torch.float32], "product")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


N = 1 << 24


def _case(table: str, run: Callable[..., Any]) -> CubinCase:
    return CubinCase(run, (table,))


def _adamw8() -> None:
    codes, largest = _meta(N, dtype=torch.uint8), _meta(N // BLOCK)
    states = (codes, largest, codes, largest)
    flat_adamw.adamw8_(_meta(N), _meta(N), *states, numbers(), _meta(4, 256), _meta(N, dtype=torch.bfloat16))


def _quantise() -> None:
    packed.dequantise_sum_(_meta(N // 8), packed.quantise(_meta(8, N // 8), 64), 64)


def _largest() -> None:
    words, _ = packed.take_largest(_meta(8, N // 8), _meta(8, N // 8), N // 160)
    packed.add_taken_(_meta(N // 8), words)


def _pack() -> None:
    tensors = [_meta(4096, 4096, dtype=torch.bfloat16)]
    packed.pack_(_meta(N), tensors)
    packed.unpack_add_(tensors, _meta(N))


def _weight_product(bytes: int = 2) -> None:
    dtype = torch.bfloat16 if bytes == 2 else torch.float32
    weight_product.add_product_(_meta(4096, 4096), _meta(8192, 4096, dtype=dtype), _meta(8192, 4096, dtype=dtype))


CUBINS = {
    "weight_product": _case("weight_product", _weight_product),
    "adamw": _case(
        "adamw",
        lambda: flat_adamw.adamw_(
            _meta(N), _meta(N, dtype=torch.bfloat16), _meta(N), _meta(N), numbers(), _meta(N, dtype=torch.bfloat16)
        ),
    ),
    "adamw8": _case("adamw8", _adamw8),
    "square_sums": _case("square_sums", lambda: ordered_sums.square_sums(_meta(N))),
    "rank_sum": _case(
        "rank_sum",
        lambda: ordered_sums.rank_sum_(_meta(N, dtype=torch.bfloat16), _meta(8, N, dtype=torch.bfloat16)),
    ),
    "pack": _case("pack", _pack),
    "quantise": _case("quantise", _quantise),
    "take": _case("take", _largest),
}
