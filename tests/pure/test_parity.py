"""Parallel equals serial: the decoder on every mesh of up to 6 ranks, against one rank. Ranks are threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, partial
from itertools import product

import pytest

from parity_cases import MODELS, Case, Outcome, compare, same_bits, train
from triloom.groups.solo import Solo
from triloom.groups.threads import run_threads

TOLERANCE = {"float64": (1e-11, 1e-12), "float32": (2e-4, 2e-5)}
"""(relative, absolute) by dtype. fp32: sums over tp and dp are added in another order, and Adam's division by the
root of a second moment near zero carries a last-bit difference into the weight; 4 steps at a high learning rate."""


def meshes(counts: tuple[int, ...] = (1, 2, 3, 4, 6)) -> Iterator[tuple[int, int, int]]:
    for n in counts:
        yield from ((n // (p * t), p, t) for p, t in product(range(1, n + 1), repeat=2) if n % (p * t) == 0)


def fits(case: Case) -> bool:
    heads = MODELS[case.model].kv_heads
    return heads % case.tp == 0 and case.pp <= MODELS[case.model].layers + 2 and not (case.sequence and case.tp == 1)


def every_case() -> list[Case]:
    """The full product."""
    axes = product(MODELS, meshes(), (False, True), ("1f1b", "gpipe"), ("zero0", "zero1", "zero2", "zero3"), (1, 2, 7))
    cases = [
        Case(model, dp, pp, tp, sequence, schedule, m, placement)
        for model, (dp, pp, tp), sequence, schedule, placement, m in axes
        if m * dp <= 12
    ]
    return [c for c in cases if fits(c)]


def cover() -> list[Case]:
    """Every seventh of the product, shifted so that every value of every axis appears, and the odd shapes."""
    odd = [
        Case("llama", pp=3, stages=(1, 3, 1), microbatches=8),
        Case("gpt2", pp=2, stages=(4, 1), tp=2, sequence=True, microbatches=7),
        Case("llama_gqa_tied", dp=2, pp=2, stages=(1, 4), microbatches=2),
        Case("gpt2", pp=5, microbatches=3),
        Case("llama", pp=4, microbatches=1),
        Case("gpt2", dp=2, pp=2, tp=1, microbatches=6, order=("pp", "tp", "dp")),
        Case("llama", dp=3, tp=2, microbatches=2, order=("tp", "dp", "pp"), sequence=True),
        Case("llama", dp=2, tp=2, microbatches=2, bucket_bytes=1 << 24),
        Case("gpt2", dp=2, microbatches=2, bucket_bytes=1),
    ]
    return every_case()[::37] + odd


@cache
def alone(case: Case) -> Outcome:
    return train(Solo(), case)


def check(case: Case) -> None:
    rtol, atol = TOLERANCE[case.dtype]
    for outcome in run_threads(case.ranks, lambda group: train(group, case)):
        compare(outcome, alone(case.alone()), rtol=rtol, atol=atol)


def name(case: Case) -> str:
    default = asdict(Case(case.model))
    return "-".join([case.model, *(f"{k}{v}" for k, v in asdict(case).items() if v != default[k])])


@pytest.mark.parametrize("case", cover(), ids=name)
def test_mesh_equals_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", every_case(), ids=name)
def test_full_product_equals_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", [replace(c, dtype="float32") for c in every_case()[::131]], ids=name)
def test_fp32_equals_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("cadence", ["step", "microbatch"])
@pytest.mark.parametrize("mesh", [(3, 1, 1), (1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("model", ["llama_gqa_tied", "gpt2"])
def test_schedule_stage_and_buckets_do_not_change_a_bit(model: str, mesh: tuple[int, int, int], cadence: str) -> None:
    first = Case(model, *mesh, sequence=mesh[2] > 1, microbatches=3, dtype="float32", steps=2, cadence=cadence)
    others = [
        replace(first, placement="zero0", schedule="gpipe", bucket_bytes=600),
        replace(first, placement="zero2", bucket_bytes=1 << 20),
        replace(first, placement="zero3", schedule="zb_h1"),
        replace(first, placement="zero3", bucket_bytes=1 << 20, recompute=True),
    ]
    want = run_threads(first.ranks, lambda group: train(group, first))
    for other in others:
        for one, two in zip(run_threads(other.ranks, partial(train, case=other)), want, strict=True):
            same_bits(one, two)
