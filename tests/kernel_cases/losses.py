"""Bodies of the tests of the cross-entropy: whole, by shards, and fused with the projection."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triloom_kernels.cross_entropy import (
    EAGER_PARTS,
    CrossEntropy,
    Parts,
    Terms,
    cross_entropy,
)
from triloom_kernels.fused_loss import Plan, fused_loss, linear_cross_entropy
from triloom_kernels.softmax_loss import KERNEL_PARTS

from .common import TOLERANCE, CubinCase, backward, draw, meta, near, poisoned


class Shape(NamedTuple):
    n: int
    v: int
    smoothing: float = 0.0
    z_loss: float = 0.0
    ignored: float = 0.2
    """Share of the targets."""
    scale: float = 3.0
    """Of the logits."""

    @property
    def terms(self) -> Terms:
        return Terms(self.smoothing, self.z_loss)


def drawn(count: int, seed: int, wide: bool = False) -> list[Shape]:
    r = random.Random(seed)
    sizes = (1, 3, 17, 127, 129, 1000, 5000) + ((50257, 131072, 150001) if wide else ())
    return [
        Shape(
            r.choice((1, 3, 17)),
            r.choice(sizes),
            r.choice((0.0, 0.1)),
            r.choice((0.0, 1e-2)),
            r.choice((0.0, 0.3, 1.0)),
            r.choice((1.0, 3.0, 100.0)),
        )
        for _ in range(count)
    ]


def targets(shape: Shape, device: str, seed: int = 5) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    t = torch.randint(shape.v, (shape.n,), generator=gen)
    return t.masked_fill(torch.rand(shape.n, generator=gen) < shape.ignored, -100).to(device)


def by_formula(x: Tensor, t: Tensor, terms: Terms) -> Tensor:
    """The formula, in fp64, with torch's own log-sum."""
    lse = x.logsumexp(-1)
    at = x.gather(1, t.clamp(min=0).unsqueeze(1)).squeeze(1)
    loss = (1 - terms.smoothing) * (lse - at) + terms.z_loss * lse.square()
    if terms.smoothing:
        loss = loss + terms.smoothing * (lse - x.mean(-1))
    return loss.masked_fill(t == -100, 0).sum()


def check_whole(shape: Shape, dtype: torch.dtype, device: str, parts: Parts = KERNEL_PARTS, seed: int = 1) -> None:
    """Loss and gradient, in place and not, rows apart in memory."""
    t = targets(shape, device)
    storage = draw(shape.n, shape.v + 3, seed=seed, dtype=dtype, device=device, scale=shape.scale)
    exact = storage[:, : shape.v].double().requires_grad_()
    expected = by_formula(exact, t, shape.terms)
    (grad,) = torch.autograd.grad(0.7 * expected, exact)
    for in_place in (False, True):
        leaf = storage.clone().requires_grad_()
        given = leaf.clone()[:, : shape.v]
        with poisoned():
            loss = cross_entropy(given, t, terms=shape.terms, parts=parts, in_place=in_place)
            if not in_place:
                assert torch.equal(given, leaf[:, : shape.v])
            (found,) = torch.autograd.grad(0.7 * loss, leaf)
        near(loss, expected, TOLERANCE[torch.promote_types(dtype, torch.float32)] * 4, "loss")
        near(found[:, : shape.v], grad, TOLERANCE[dtype], "gradient")
        assert not found[:, shape.v :].any()
        if in_place and (parts is KERNEL_PARTS or dtype == torch.float32):
            assert torch.equal(given.detach(), found[:, : shape.v])


def check_shards(shape: Shape, dtype: torch.dtype, device: str, cuts: tuple[int, ...]) -> None:
    """Split at ``cuts``, some shards empty: every shard gives the whole loss and its part of the gradient."""
    t = targets(shape, device)
    x = draw(shape.n, shape.v, seed=2, dtype=dtype, device=device, scale=shape.scale)
    x[0, : cuts[1]] = -torch.inf  # a shard without a probability
    exact = x.double().requires_grad_()
    terms = shape.terms if not shape.smoothing else Terms(0.0, shape.z_loss)  # a mean of -inf is none
    expected = by_formula(exact, t, terms)
    (grad,) = torch.autograd.grad(0.7 * expected, exact)
    bounds = list(itertools.pairwise(cuts))
    local = [torch.where((t >= a) & (t < b), t - a, -1) for a, b in bounds]
    parts = []
    for (a, b), index in zip(bounds, local, strict=True):
        with poisoned():
            made = KERNEL_PARTS.statistics(x[:, a:b], index, whole=False, in_place=False)
        parts.append(torch.stack((made.largest, made.log_top, made.target.masked_fill(index < 0, 0))))
    for (a, b), index in zip(bounds, local, strict=True):
        leaf = x[:, a:b].clone().requires_grad_()
        with poisoned():
            loss = CrossEntropy.apply(  # type: ignore[no-untyped-call]
                leaf, index, t == -100, shape.v, lambda _: torch.stack(parts), terms, KERNEL_PARTS, False
            )
            (found,) = torch.autograd.grad(0.7 * loss, leaf)
        near(loss, expected, TOLERANCE[torch.promote_types(dtype, torch.float32)] * 4, "loss")
        near(found, grad[:, a:b], TOLERANCE[dtype], "gradient")


def check_fused(shape: Shape, dtype: torch.dtype, device: str, chunk: int, parts: Parts = KERNEL_PARTS) -> None:
    """Against the product and the formula in fp64."""
    t = targets(shape, device)
    x = draw(shape.n, 12, seed=3, dtype=dtype, device=device)
    w = draw(shape.v, 12, seed=4, dtype=dtype, device=device)
    exact = [v.double().requires_grad_() for v in (x, w)]
    expected = by_formula(exact[0] @ exact[1].t(), t, shape.terms)
    grads = torch.autograd.grad(0.7 * expected, exact)
    leaves = [v.requires_grad_() for v in (x, w)]
    with poisoned():
        loss = linear_cross_entropy(*leaves, t, terms=shape.terms, parts=parts, chunk=chunk)
        found = torch.autograd.grad(0.7 * loss, leaves)
    loose = 3 * TOLERANCE[dtype]  # logits and their gradient are rounded to dtype
    near(loss, expected, loose, "loss")
    for name, a, e in zip(("dx", "dw"), found, grads, strict=True):
        near(a, e, loose, name)


def check_fused_shards(device: str, parts: Parts = KERNEL_PARTS) -> None:
    """Two shards and an empty one; the writer of the weight's gradient is kept and called later, twice."""
    shape, cuts, chunk = Shape(11, 20, 0.1, 1e-2), (0, 13, 13, 20), 4
    t = targets(shape, device)
    x = draw(shape.n, 6, seed=3, dtype=torch.float64, device=device)
    w = draw(shape.v, 6, seed=4, dtype=torch.float64, device=device)
    exact = [v.clone().requires_grad_() for v in (x, w)]
    expected = by_formula(exact[0] @ exact[1].t(), t, shape.terms)
    grads = torch.autograd.grad(0.7 * expected, exact)
    bounds = list(itertools.pairwise(cuts))
    local = [torch.where((t >= a) & (t < b), t - a, -1) for a, b in bounds]
    every = []  # what an all_gather would give, chunk by chunk
    for at in range(0, shape.n, chunk):
        made = [
            parts.statistics(
                x[at : at + chunk] @ w[a:b].t(), i[at : at + chunk], whole=False, in_place=True, with_total=True
            )
            for (a, b), i in zip(bounds, local, strict=True)
        ]
        every.append(
            torch.stack(
                [
                    torch.stack((m.largest, m.log_top, m.target.masked_fill(i[at : at + chunk] < 0, 0), m.total))
                    for m, i in zip(made, local, strict=True)
                ]
            )
        )
    total = torch.zeros_like(x)
    for (a, b), index in zip(bounds, local, strict=True):
        chunks = iter(every)
        kept: list[Any] = []
        plan = Plan(
            shape.v,
            lambda _, c=chunks: next(c),
            shape.terms,
            parts,
            chunk,
            lambda write, k=kept: k.append(write),  # type: ignore[misc]
        )
        leaves = [v.clone().requires_grad_() for v in (x, w[a:b])]
        loss = fused_loss(*leaves, index, t == -100, plan)
        (0.7 * loss).backward()
        near(loss, expected, 1e-11, "loss")
        assert leaves[1].grad is None
        out = torch.full_like(w[a:b], torch.nan)
        kept[0](out, False)
        kept[0](out, True)
        near(out, 2 * grads[1][a:b], 1e-11, "dw")
        total += leaves[0].grad
    near(total, grads[0], 1e-11, "dx")


def check_extremes(device: str) -> None:
    """-inf, huge logits, nan in its own row, a row of -inf."""
    x = draw(6, 40, seed=6, dtype=torch.float32, device=device)
    x[0, 5:] = -torch.inf
    x[1] *= 1e30
    x[2, 3] = torch.nan
    x[3] = torch.nan
    x[4] = -torch.inf
    local = torch.tensor([2, 7, 7, 7, 7, 7], device=device)
    none = torch.zeros(6, dtype=torch.bool, device=device)
    found, gradient = KERNEL_PARTS.both(x.clone(), local, none, Terms())
    expected, wanted = EAGER_PARTS.both(x.double(), local, none, Terms())
    near(found, expected, 1e-5, "losses")
    near(gradient[[0, 1, 5]], wanted[[0, 1, 5]], 1e-5, "gradient")
    assert gradient[[2, 3, 4]].isnan().any(1).all()
    for row in (3, 4):
        shard = KERNEL_PARTS.statistics(x[row : row + 1], local[:1], whole=False, in_place=False)
        assert shard.log_top.isnan().item() == (row == 3)
        whole = KERNEL_PARTS.statistics(x[row : row + 1], local[:1], whole=True, in_place=False)
        assert whole.log_top.isnan().item()


def cubins(vocab: int = 128256) -> None:
    """Whole and by shards, with everything on, and the fused one."""
    terms = Terms(0.1, 1e-4)
    ids = torch.empty(8192, dtype=torch.int64, device="meta")
    flags = torch.empty(8192, dtype=torch.bool, device="meta")
    logits = meta(8192, vocab)
    backward(CrossEntropy.apply(logits, ids, flags, vocab, None, terms, KERNEL_PARTS, True))  # type: ignore[no-untyped-call]
    KERNEL_PARTS.both(meta(4096, vocab), ids, flags, terms)


CUBINS = {"cross_entropy": CubinCase(cubins, ("loss_statistics", "loss_gradient"))}
