"""What is measured: operations, sizes, the bytes and operations they need at least, and who does them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import table
from ..adamw import BLOCK
from ..fused_loss import add_product_
from . import plain

Function = Callable[..., Any]
EPS = 1e-5
KEY = 0x1234567890ABCDEF
HEADS, KV_HEADS, DIM = 32, 8, 128


@dataclass(frozen=True)
class Case:
    """One operation at one size. inputs and extra make arguments on a device; only inputs are differentiated."""

    op: str
    size: str
    ours: Function
    theirs: Function | None
    """As a user of torch writes it; called with the same arguments. None where torch has nothing of the kind."""
    inputs: Callable[[torch.device], list[Tensor]]
    extra: Callable[[torch.device], list[Any]] = lambda device: []
    forward: float = 0.0
    """Bytes that must move, or operations if ``flops``."""
    backward: float = 0.0
    """0: there is none, or it cannot be repeated."""
    both: float = 0.0
    """Of forward and backward timed together."""
    flops: bool = False
    named: Mapping[str, Function] | None = None
    """More contenders."""


def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[torch.device], Tensor]:
    return lambda device: torch.randn(*shape, dtype=dtype, device=device)


def many(*makers: Callable[[torch.device], Tensor]) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [maker(device) for maker in makers]


def kernels(device: torch.device) -> table.Kernels:
    """Triton on a GPU; the eager references elsewhere."""
    return table.default() if device.type == "cuda" else table.eager()


def cases(device: torch.device, *, small: bool = False) -> Iterator[Case]:
    """All of them; small: sizes for a look at the path on a CPU."""
    pick = kernels(device)
    tokens = 256 if small else 8192
    for width in (128,) if small else (768, 2048, 4096, 8192):
        yield from _norms(pick, device, tokens, width)
    if not small:
        yield from _norms(pick, device, 512, 768)
    yield from _activations(pick, device, tokens, 64 if small else 14336)
    yield from _rotation(pick, device, 2 if small else 4, 16 if small else 2048)
    yield from _losses(pick, device, 64 if small else 8192, 1000 if small else 131072, 32 if small else 4096)
    for s in (32,) if small else (2048, 8192, 16384):
        yield _attention(pick, device, 1 if small else max(1, 16384 // s), s)
    yield from _flat(pick, device, 1 << (12 if small else 26))
    yield _product(device, 64 if small else 8192, 32 if small else 4096)


def _norms(pick: table.Kernels, device: torch.device, tokens: int, width: int) -> Iterator[Case]:
    n, size = 2.0 * tokens * width, f"{tokens} x {width}"
    x, w = make(tokens, width), make(width)
    for op, function, peer, count in (
        ("rms_norm", "rms_norm", plain.rms_norm, 1),
        ("layer_norm", "layer_norm", plain.layer_norm, 2),
    ):
        weights = [w] * count
        yield Case(
            op, size, pick.pick(function, device), peer, many(x, *weights), lambda device: [EPS],
            forward=2 * n, backward=3 * n,
        )  # fmt: skip
        yield Case(
            f"{op}_residual", size, pick.pick(f"{function}_residual", device), getattr(plain, f"{op}_residual"),
            many(x, x, *weights), lambda device: [EPS], forward=4 * n, backward=4 * n,
        )  # fmt: skip


def _activations(pick: table.Kernels, device: torch.device, tokens: int, width: int) -> Iterator[Case]:
    n, size = 2.0 * tokens * width, f"{tokens} x {width}"
    for op, peer in (("swiglu", plain.swiglu), ("geglu", plain.geglu)):
        yield Case(op, size, pick.pick(op, device), peer, many(make(tokens, 2 * width)), forward=3 * n, backward=5 * n)
    ours = pick.pick("bias_gelu", device)
    yield Case(
        "bias_gelu", size, ours, plain.bias_gelu, many(make(tokens, width), make(width)), forward=2 * n, backward=3 * n
    )
    drop = pick.pick("bias_dropout_residual", device)
    h = 32 if tokens < 1000 else 4096
    yield Case(
        "bias_dropout_residual", f"{tokens} x {h}", lambda x, b, r: drop(x, b, r, 0.1, KEY, 0, (h, 1)),
        plain.bias_dropout_residual, many(make(tokens, h), make(h), make(tokens, h)),
        forward=3 * 2.0 * tokens * h, backward=2 * 2.0 * tokens * h,
    )  # fmt: skip


def _rotation(pick: table.Kernels, device: torch.device, batch: int, seq: int) -> Iterator[Case]:
    width = (HEADS + 2 * KV_HEADS) * DIM
    n = 2.0 * batch * seq * width
    tables = [torch.randn(seq, 1, DIM // 2, device=device) for _ in range(2)]
    ours = pick.pick("split_rotate", device)
    yield Case(
        "split_rotate", f"{batch} x {seq} x {width}", ours, plain.split_rotate, many(make(batch, seq, width)),
        lambda device: [*tables, HEADS, KV_HEADS], forward=2 * n, backward=2 * n,
    )  # fmt: skip


def _losses(pick: table.Kernels, device: torch.device, tokens: int, vocab: int, width: int) -> Iterator[Case]:
    from ..cross_entropy import EAGER_PARTS, cross_entropy
    from ..fused_loss import linear_cross_entropy

    parts = EAGER_PARTS
    if device.type == "cuda":
        from ..softmax_loss import KERNEL_PARTS

        parts = KERNEL_PARTS

    def targets(device: torch.device) -> list[Any]:
        return [torch.randint(vocab, (tokens,), device=device)]

    yield Case(
        "cross_entropy", f"{tokens} x {vocab}", lambda x, t: cross_entropy(x, t, parts=parts), plain.cross_entropy,
        many(make(tokens, vocab)), targets, both=3 * 2.0 * tokens * vocab,
    )  # fmt: skip
    yield Case(
        "linear_cross_entropy", f"{tokens} x {width} x {vocab}",
        lambda x, w, t: linear_cross_entropy(x, w, t, parts=parts), plain.linear_cross_entropy,
        many(make(tokens, width), make(vocab, width)), targets, both=6.0 * tokens * width * vocab, flops=True,
    )  # fmt: skip


def _attention(pick: table.Kernels, device: torch.device, batch: int, seq: int) -> Case:
    product = 4.0 * batch * HEADS * seq * seq * DIM / 2  # two products of the lower triangle
    q, kv = make(batch, HEADS, seq, DIM), make(batch, KV_HEADS, seq, DIM)
    return Case(
        "attention", f"{batch} x {HEADS}/{KV_HEADS} x {seq} x {DIM}, causal", pick.pick("attention", device),
        plain.attention, many(q, kv, kv), forward=product, backward=2.5 * product, flops=True,
    )  # fmt: skip


def _flat(pick: table.Kernels, device: torch.device, n: int) -> Iterator[Case]:
    f32 = torch.float32
    numbers = (1.0, 0.9, 0.1, 0.95, 0.05, 0.999, 1e-3, 1.0, 1e-8)

    def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor) -> None:
        pick.pick("adamw_", device)(p, g, m, v, numbers, low)

    def torch_adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, low: Tensor) -> None:
        step = torch.ones((), device=p.device)
        torch._fused_adamw_(
            [p], [g.float()], [m], [v], [], [step], lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8,
            amsgrad=False, maximize=False,
        )  # fmt: skip
        low.copy_(p)

    state = many(make(n, dtype=f32), make(n), make(n, dtype=f32), lambda d: torch.rand(n, device=d), make(n))
    size = f"{n}, bf16 gradient and copy"
    yield Case("adamw", size, _detached(adamw), _detached(torch_adamw), state, forward=28.0 * n)

    def adamw8(p: Tensor, g: Tensor, m: Tensor, mx: Tensor, r: Tensor, rx: Tensor, tables: Tensor, low: Tensor) -> None:
        pick.pick("adamw8_", device)(p, g, m, mx, r, rx, numbers, tables, low)

    codes = lambda d: torch.randint(255, (n,), dtype=torch.uint8, device=d)  # noqa: E731
    tops = lambda d: torch.rand(n // BLOCK, device=d)  # noqa: E731
    tables = lambda d: torch.linspace(-1, 1, 256, device=d).repeat(4, 1)  # noqa: E731
    eight = many(make(n, dtype=f32), make(n), codes, tops, codes, tops, tables, make(n))
    yield Case("adamw8", size, _detached(adamw8), None, eight, forward=16.25 * n)
    sums = pick.pick("square_sums", device)
    yield Case(
        "square_sums", f"{n}, fp32", _detached(sums), _detached(lambda x: torch.linalg.vector_norm(x)),
        many(make(n, dtype=f32)), forward=4.0 * n,
    )  # fmt: skip
    rank_sum = pick.pick("rank_sum_", device)
    out = torch.empty(n // 8, dtype=torch.bfloat16, device=device)
    yield Case(
        "rank_sum", f"8 x {n // 8}, bf16", _detached(lambda x: rank_sum(out, x)),
        _detached(lambda x: out.copy_(x.sum(0, dtype=f32))), many(make(8, n // 8)), forward=2.0 * n * 9 / 8,
    )  # fmt: skip
    quantise = pick.pick("quantise", device)
    yield Case(
        "quantise", f"8 x {n // 8}, fp32", _detached(lambda x: quantise(x, 64)), None, many(make(8, n // 8, dtype=f32)),
        forward=5.0625 * n,
    )  # fmt: skip
    pack = pick.pick("pack_", device)
    bucket = torch.empty(n, device=device)
    pieces = [torch.randn(n // 64, dtype=torch.bfloat16, device=device) for _ in range(64)]
    yield Case(
        "pack", f"64 x {n // 64}, bf16 to fp32", _detached(lambda: pack(bucket, pieces)),
        _detached(lambda: torch._foreach_copy_(list(torch.split(bucket, n // 64)), pieces)), many(), forward=6.0 * n,
    )  # fmt: skip


def _product(device: torch.device, rows: int, width: int) -> Case:
    out = torch.zeros(width, width, device=device)
    named: dict[str, Function] = {}
    if device.type == "cuda":
        from ..weight_product import add_product_ as kernel

        named = {"kernel": _detached(lambda g, x: kernel(out, g, x))}
    return Case(
        "weight_product", f"{rows} x {width} x {width}", _detached(lambda g, x: add_product_(out, g, x)), None,
        many(make(rows, width), make(rows, width)), forward=2.0 * rows * width * width, flops=True, named=named,
    )  # fmt: skip


def _detached(function: Function) -> Function:
    """Without a graph: what is updated in place asks for no gradient."""

    def run(*arguments: Any) -> Any:
        with torch.no_grad():
            return function(*arguments)

    return run


def grads_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn_like(t) for t in outputs]
