"""The loss fused with its projection against the two apart, on ranks as threads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tp_cases import F64, Sink, chunk, close, randint, randn
from triloom import SGD, Engine
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads
from triloom.mesh import make_mesh
from triloom.models import decoder, gpt2, llama
from triloom.operations import operations
from triloom.scope import Scope
from triloom.shards import split_even
from triloom.tp import vocab_parallel_linear_cross_entropy
from triloom_kernels.cross_entropy import EAGER_PARTS, Parts, Terms


def bounded(rows: int) -> Parts:
    """Parts that never see more logits than a chunk of tokens has."""

    def check(function: Any) -> Any:
        def checked(logits: Tensor, *args: Any, **options: Any) -> Any:
            assert len(logits) <= rows
            return function(logits, *args, **options)

        return checked

    return Parts(check(EAGER_PARTS.statistics), EAGER_PARTS.gradient, check(EAGER_PARTS.both))


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("vocab", [2, 13])
@pytest.mark.parametrize("sink", ["none", "immediate", "deferred"])
def test_fused_equals_dense(tp: int, sequence: bool, vocab: int, sink: str) -> None:
    targets, terms = randint(vocab, 12, 3), Terms(0.1, 1e-2)
    targets[1:5, 1] = -100
    x, w = randn(12, 3, 6), randn(vocab, 6, seed=1)

    def body(group: Group) -> tuple[Tensor, ...]:
        weight = nn.Parameter(w[slice(*split_even(vocab, group.size)[group.rank])].clone())
        keeper = None if sink == "none" else Sink([weight], sink == "immediate")
        leaf = chunk(x, group, sequence).clone().requires_grad_()
        for _ in range(1 if keeper is None else 2):  # the second time is added
            loss, count = vocab_parallel_linear_cross_entropy(
                leaf, weight, targets, group=group, vocab=vocab, sequence=sequence, sink=keeper, terms=terms,
                parts=bounded(5), chunk=5,
            )  # fmt: skip
            leaf.grad = None
            (0.7 * loss).backward()
        if keeper is not None:
            assert weight.grad is None
            keeper.flush()
            weight.grad = keeper.out[id(weight)] / 2
        assert leaf.grad is not None
        assert weight.grad is not None
        return loss.detach(), count, leaf.grad, weight.grad

    ranks = run_threads(tp, body)
    dense = [v.clone().requires_grad_() for v in (x, w)]
    logits = (dense[0] @ dense[1].t()).view(36, vocab)
    log_sum, t = logits.logsumexp(-1), targets.view(-1)
    at = logits.gather(1, t.clamp(min=0).unsqueeze(1)).squeeze(1)
    loss = 0.9 * (log_sum - at) + 0.1 * (log_sum - logits.mean(-1)) + 1e-2 * log_sum.square()
    loss = loss[t != -100].sum()
    (0.7 * loss).backward()
    for got in ranks:
        close(got[0], loss.detach())
        assert got[1] == 32
    close(torch.cat([r[2] for r in ranks]) if sequence else ranks[0][2], dense[0].grad)  # type: ignore[arg-type]
    close(torch.cat([r[3] for r in ranks]), dense[1].grad)  # type: ignore[arg-type]


def test_weight_gradient_of_16_bit_is_summed_in_fp32() -> None:
    """Many small terms that bf16 sums would lose."""
    n = 512
    x = torch.full((n, 1), 1.0, dtype=torch.bfloat16)
    weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.bfloat16))
    sink = Sink([weight], True, torch.float32)
    loss, _ = vocab_parallel_linear_cross_entropy(
        x, weight, torch.zeros(n, dtype=torch.int64), group=Solo(), vocab=2, sink=sink, chunk=1
    )
    loss.backward()
    assert sink.out[id(weight)].tolist() == [[-n / 2], [n / 2]]


def test_target_outside_the_vocabulary() -> None:
    with pytest.raises(ConfigError, match=r"target 13 on rank 0 .*0\.\.12"):
        vocab_parallel_linear_cross_entropy(
            randn(1, 6), nn.Parameter(randn(13, 6)), torch.tensor([13]), group=Solo(), vocab=13
        )


def test_forward_without_gradients_makes_none() -> None:
    with torch.no_grad():
        loss, _ = vocab_parallel_linear_cross_entropy(
            randn(4, 6), nn.Parameter(randn(13, 6)), randint(13, 4), group=Solo(), vocab=13,
            parts=Parts(EAGER_PARTS.statistics, None, None),  # type: ignore[arg-type]
        )  # fmt: skip
    assert loss.isfinite()


SIZES: dict[str, Any] = {"vocab": 19, "hidden": 16, "layers": 2, "heads": 4, "max_seq": 8}


@pytest.mark.parametrize(("ranks", "tp", "options"), [
    (1, 1, {}),
    (2, 2, {}),
    (2, 2, {"sequence_parallel": True}),
    (2, 1, {"schedule": "zb_h1"}),
])  # fmt: skip
@pytest.mark.parametrize("config", [llama(**SIZES, kv_heads=2), gpt2(**SIZES)], ids=["llama", "gpt2, tied"])
def test_models_train_alike(config: Any, ranks: int, tp: int, options: dict[str, Any]) -> None:
    gen = torch.Generator().manual_seed(3)
    ids, targets = (torch.randint(0, 19, (4, 6), generator=gen) for _ in range(2))
    targets[0, :2] = -100

    def train(world: Group, fused: bool) -> tuple[list[float], dict[str, Tensor]]:
        model = decoder(replace(config, fused_loss=fused))
        engine = Engine(
            model.units, model.loss, ties=model.ties, world=world, mesh=make_mesh(ranks, tp=tp, pp=ranks // tp),
            optimizer=SGD(lr=0.1), seed=5, microbatches=4, dtype=F64, **options,
        )  # fmt: skip
        return [engine.step(ids, targets).loss for _ in range(2)], engine.full_state()

    apart, fused = (run_threads(ranks, lambda g, f=f: train(g, f))[0] for f in (False, True))
    assert fused[0] == pytest.approx(apart[0], rel=1e-12)
    for name, value in apart[1].items():
        close(fused[1][name], value)


@pytest.mark.parametrize(("fused", "used"), [(None, {"statistics", "gradient"}), (True, {"both"})])
def test_loss_takes_its_parts_from_the_table(fused: bool | None, used: set[str]) -> None:
    called = set()

    def noting(part: str) -> Any:
        function = operations().pick(f"cross_entropy_{part}", "cpu")

        def noted(*args: Any, **options: Any) -> Any:
            called.add(part)
            return function(*args, **options)

        return noted

    kernels = operations()
    for part in ("statistics", "gradient", "both"):
        kernels = kernels.using(f"cross_entropy_{part}", noting(part), "cpu")
    loss = decoder(replace(llama(**SIZES), fused_loss=fused)).loss(Scope(kernels=kernels))
    value, _ = loss(torch.randn(2, 4, 16), torch.zeros(2, 4, dtype=torch.int64))
    value.backward()
    # The eager `both` is made of eager parts, not of the table's.
    assert called == used
