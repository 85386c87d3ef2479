"""Embedding and cross-entropy with a split vocabulary on ranks as threads, against the dense torch operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tp_cases import F64, Sink, assemble, chunk, close, grads_of, randint, randn, values_of
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.scope import Scope
from triloom.shards import split_even
from triloom.tp import (
    VocabParallelEmbedding,
    gather_vocab,
    vocab_parallel_cross_entropy,
)
from triloom_kernels.cross_entropy import UsedUpError

TP = pytest.mark.parametrize("tp", [1, 2, 3, 4])
SEQUENCE = pytest.mark.parametrize("sequence", [False, True])


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
    with pytest.raises(UsedUpError, match="already holds the gradient"):
        loss.backward()


@TP
def test_gather_vocab(tp: int) -> None:
    x = randn(2, 3, 5)
    got = run_threads(tp, lambda g: gather_vocab(x[..., slice(*split_even(5, tp)[g.rank])].contiguous(), 5, g))
    assert all(torch.equal(y, x) for y in got)
