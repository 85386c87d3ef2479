"""Parallel equals serial under mpirun: a pairwise cover of meshes and options, drawn in the parent."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations, product
from typing import Any

import pytest

from harness import ship
from parity_cases import MODELS, Case

AXES: dict[str, tuple[Any, ...]] = {
    "model": tuple(MODELS),
    "sequence": (False, True),
    "schedule": ("1f1b", "gpipe"),
    "placement": ("zero0", "zero1", "zero2", "zero3"),
    "microbatches": (1, 2, 6),
    "dtype": ("float64", "float32"),
}


def pairwise(ranks: int) -> list[Case]:
    """Cases in which every pair of values of any two axes (the mesh is one) appears, if it can."""
    meshes = [(ranks // (p * t), p, t) for p, t in product(range(1, ranks + 1), repeat=2) if ranks % (p * t) == 0]
    rows = []
    for mesh, *values in product(meshes, *AXES.values()):
        case = Case(**dict(zip(AXES, values, strict=True)), dp=mesh[0], pp=mesh[1], tp=mesh[2], steps=3)
        if MODELS[case.model].kv_heads % case.tp == 0 and (case.tp > 1 or not case.sequence) and case.dp * 6 <= 12:
            rows.append((case, frozenset(combinations(enumerate((mesh, *values)), 2))))
    missing = frozenset().union(*(pairs for _, pairs in rows))
    chosen = []
    while missing:
        case, pairs = max(rows, key=lambda row: len(row[1] & missing))
        chosen.append(case)
        missing -= pairs
    return chosen


@pytest.mark.parametrize("ranks", [2, 3, 4, pytest.param(6, marks=pytest.mark.full)])
def test_pairwise_cover_equals_one_rank(ranks: int) -> None:
    results = ship(ranks, "tests/ranks/cases_parity.py:run", [asdict(c) for c in pairwise(ranks)], launch=300)
    for per_rank in results:
        assert all(losses == per_rank[0] for losses in per_rank)
