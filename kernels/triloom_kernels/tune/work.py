"""What a table's options are judged by: an operation at the sizes of an entry, through the kernels and eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import fused_loss, table
from ..adamw import BLOCK
from ..cross_entropy import PLAIN

Function = Callable[..., Any]
Results = tuple[Tensor, ...]
Run = Callable[[], Results]
NUMBERS = (1.0, 0.9, 0.1, 0.95, 0.05, 0.999, 1e-3, 1.0, 1e-8)
KEY = 0x1234567890ABCDEF
LONGEST = 4096
"""Tokens of a sequence."""


@dataclass(frozen=True)
class Extent:
    """What tables do not name. rows: tokens; elements: of a flat tensor; half: the 16-bit type."""

    rows: int
    elements: int
    heads: int
    half: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Problem:
    """prepare: makes of a function what is timed, and whose results are compared; in-place work on copies."""

    prepare: Callable[[Function], Run]
    kernel: Function
    eager: Function


@dataclass(frozen=True)
class Work:
    """A table's problem. beyond: sizes for an entry without bounds."""

    make: Callable[..., Problem]
    beyond: Mapping[str, int]


def results(made: Any) -> Results:
    return made if isinstance(made, tuple) else (made,)


def picked(op: str) -> tuple[Function, Function]:
    """The kernel and the eager function."""
    return table.default().pick(op, "cuda"), table.EAGER[op]


def forward(op: str, *arguments: Any) -> Problem:
    return Problem(lambda f: lambda: results(f(*arguments)), *picked(op))


def both(op: str, inputs: list[Tensor], *more: Any, again: bool = False) -> Problem:
    """Forward and backward; with ``again`` the backward alone is timed, over one graph."""

    def prepare(function: Function) -> Run:
        leaves = [x.detach().requires_grad_() for x in inputs]

        def ahead() -> Results:
            return results(function(*leaves, *more))

        made = ahead()
        grads = [torch.ones_like(t) * 0.5 for t in made]
        if again:
            return lambda: torch.autograd.grad(made, leaves, grads, retain_graph=True)

        def run() -> Results:
            fresh = ahead()
            return *fresh, *torch.autograd.grad(fresh, leaves, grads)

        return run

    return Problem(prepare, *picked(op))


def in_place(kernel: Function, eager: Function, state: list[Tensor], *more: Any) -> Problem:
    """The function changes ``state``, its first arguments."""

    def prepare(function: Function) -> Run:
        own = [x.clone() for x in state]

        def run() -> Results:
            function(*own, *more)
            return tuple(own)

        return run

    return Problem(prepare, kernel, eager)


def _norm(e: Extent, *, width: int, again: bool) -> Problem:
    x, w = _draw(e, e.rows, width), _draw(e, width)
    return both("rms_norm", [x, w], 1e-5, again=True) if again else forward("rms_norm", x, w, 1e-5)


def _sum_rows(e: Extent, *, width: int) -> Problem:
    from ..rows import sum_rows

    parts = _draw(e, 2, 264, width, dtype=torch.float32)
    return Problem(lambda f: lambda: (f(parts, e.half),), sum_rows, lambda p, dtype: p.sum(1).to(dtype))


def _dropout(e: Extent, *, width: int) -> Problem:
    inputs = [_draw(e, e.rows, width), _draw(e, width), _draw(e, e.rows, width)]
    return both("bias_dropout_residual", inputs, 0.1, KEY, 0, (width, 1))


def _split_rotate(e: Extent, *, head_dim: int) -> Problem:
    kv = max(1, e.heads // 4)
    cos, sin = (_draw(e, e.rows, 1, head_dim // 2, dtype=torch.float32) for _ in range(2))
    return both("split_rotate", [_draw(e, 1, e.rows, (e.heads + 2 * kv) * head_dim)], cos, sin, e.heads, kv)


def _attention(e: Extent, *, width: int, bytes: int, again: bool) -> Problem:
    s, batch = min(e.rows, LONGEST), max(1, e.rows // LONGEST)
    dtype = e.half if bytes == 2 else torch.float32
    q, k, v = (_draw(e, batch, s, n, width, dtype=dtype) for n in (e.heads, *[max(1, e.heads // 4)] * 2))
    inputs = [t.transpose(1, 2) for t in (q, k, v)]
    return both("attention", inputs, again=True) if again else forward("attention", *inputs)


def _loss(e: Extent, *, vocab: int) -> Problem:
    """In place: what is timed after the first call reads gradients as logits, which takes as long."""
    logits, ids = _draw(e, e.rows, vocab), torch.arange(e.rows, device=e.device) % vocab
    ignored = torch.zeros(e.rows, dtype=torch.bool, device=e.device)
    kernel, eager = picked("cross_entropy_both")

    def prepare(function: Function) -> Run:
        own = logits.clone()
        return lambda: results(function(own, ids, ignored, PLAIN))

    return Problem(prepare, kernel, eager)


def _loss_gradient(e: Extent, *, vocab: int) -> Problem:
    logits, ids = _draw(e, e.rows, vocab), torch.arange(e.rows, device=e.device) % vocab
    one = torch.ones(e.rows, device=e.device)

    def prepare(parts: tuple[Function, Function]) -> Run:
        statistics, gradient = parts
        stated = statistics(logits, ids, whole=True, in_place=False)
        how = {"dtype": e.half, "in_place": False}
        return lambda: (gradient(stated.kept, ids, one, one, None, **how),)

    kernels, eager = zip(picked("cross_entropy_statistics"), picked("cross_entropy_gradient"), strict=True)
    return Problem(prepare, kernels, eager)  # type: ignore[arg-type]


def _adamw(e: Extent) -> Problem:
    n = e.elements
    states = [_draw(e, n, dtype=torch.float32) for _ in range(2)] + [torch.full((n,), 0.5, device=e.device)]
    grad, low = _draw(e, n), torch.zeros(n, dtype=e.half, device=e.device)
    kernel, eager = (
        lambda p, m, v, low, f=f: f(p, grad, m, v, NUMBERS, low) for f in picked("adamw_")
    )  # fmt: skip
    return in_place(kernel, eager, [*states, low])


def _adamw8(e: Extent) -> Problem:
    n = e.elements // BLOCK * BLOCK
    codes = torch.arange(n, device=e.device).remainder_(251).to(torch.uint8)
    tops = torch.full((n // BLOCK,), 0.5, device=e.device)
    grad, tables = _draw(e, n), torch.linspace(0.01, 1, 256, device=e.device).repeat(4, 1)
    kernel, eager = (lambda p, m, mx, r, rx, f=f: f(p, grad, m, mx, r, rx, NUMBERS, tables) for f in picked("adamw8_"))
    return in_place(kernel, eager, [_draw(e, n, dtype=torch.float32), codes, tops, codes, tops])


def _rank_sum(e: Extent) -> Problem:
    parts = _draw(e, 8, e.elements // 8)
    return in_place(*picked("rank_sum_"), [parts[0]], parts)


def _pack(e: Extent) -> Problem:
    pieces = [_draw(e, e.elements // 64) for _ in range(64)]
    return in_place(*picked("pack_"), [torch.zeros(64 * len(pieces[0]), device=e.device)], pieces)


def _quantise(e: Extent) -> Problem:
    """Both ways, the table's two kernels; decoded, as equal codes are not asked for."""
    x = _draw(e, 8, e.elements // 8 // 64 * 64, dtype=torch.float32)

    def prepare(parts: tuple[Function, Function]) -> Run:
        out = torch.empty_like(x[0])
        return lambda: (parts[1](out, parts[0](x, 64), 64),)

    kernels, eager = zip(picked("quantise"), picked("dequantise_sum_"), strict=True)
    return Problem(prepare, kernels, eager)  # type: ignore[arg-type]


def _take(e: Extent) -> Problem:
    """Adding what was taken; the selection itself is torch's."""
    n = e.elements // 8
    packed = table.EAGER["take_largest"](*(_draw(e, 8, n, dtype=torch.float32) for _ in range(2)), max(1, n // 20))[0]
    return in_place(*picked("add_taken_"), [torch.zeros(n, device=e.device)], packed)


def _weight_product(e: Extent, *, bytes: int) -> Problem:
    from ..weight_product import add_product_

    width, dtype = (64 if e.rows < 1024 else 4096), e.half if bytes == 2 else torch.float32
    factors = _draw(e, e.rows, width, dtype=dtype), _draw(e, e.rows, width, dtype=dtype)
    return in_place(add_product_, fused_loss.add_product_, [torch.zeros(width, width, device=e.device)], *factors)


def _draw(e: Extent, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    generator = torch.Generator(e.device).manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, device=e.device).to(dtype or e.half)


WORK: Mapping[str, Work] = {
    "norm_forward": Work(lambda e, width: _norm(e, width=width, again=False), {"width": 32768}),
    "norm_backward": Work(lambda e, width: _norm(e, width=width, again=True), {"width": 16384}),
    "sum_rows": Work(_sum_rows, {"width": 4096}),
    "gated": Work(lambda e, width: both("swiglu", [_draw(e, e.rows, 2 * width)]), {"width": 14336}),
    "gelu": Work(lambda e, width: both("bias_gelu", [_draw(e, e.rows, width), _draw(e, width)]), {"width": 16384}),
    "dropout": Work(_dropout, {"width": 4096}),
    "split_rotate": Work(_split_rotate, {"head_dim": 256}),
    "attention_forward": Work(lambda e, **sizes: _attention(e, again=False, **sizes), {}),
    **{
        f"attention_{name}": Work(lambda e, **sizes: _attention(e, again=True, **sizes), {})
        for name in ("dkdv", "dq", "dots")
    },
    "loss_statistics": Work(_loss, {"vocab": 131072}),
    "loss_gradient": Work(_loss_gradient, {"vocab": 131072}),
    "adamw": Work(_adamw, {}),
    "adamw8": Work(_adamw8, {}),
    "square_sums": Work(lambda e: forward("square_sums", _draw(e, e.elements, dtype=torch.float32)), {}),
    "rank_sum": Work(_rank_sum, {}),
    "pack": Work(_pack, {}),
    "quantise": Work(_quantise, {}),
    "take": Work(_take, {}),
    "weight_product": Work(_weight_product, {"bytes": 4}),
}
"""Every table, in the order of the files."""


def sizes_of(op: str, bounds: Mapping[str, int]) -> dict[str, int]:
    """At which sizes an entry is judged: its bounds, or those for entries without."""
    return dict(bounds or WORK[op].beyond)
