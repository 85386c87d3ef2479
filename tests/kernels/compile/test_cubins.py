"""Each kernel compiles for every architecture within its committed budget of registers, spills and shared memory.

``pytest tests/kernels/compile --write-budget`` takes the present needs as the budget; read the difference before
committing it. Registers are allotted in eights; one more eight is left for what Triton's versions differ in.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kernel_cases.cubin_cases import BEYOND, CASES, Measured, check, measure
from triloom_kernels import tuning
from triloom_kernels.cubins import ARCHITECTURES

BUDGET = Path(__file__).with_name("budget.json")
PRODUCT = [(case, arch) for case in CASES for arch in ARCHITECTURES]


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def compiled(workers: ProcessPoolExecutor, request: pytest.FixtureRequest) -> Mapping[Any, Future[Measured]]:
    """Every case that is asked for, under way from the start."""
    asked = {item.callspec.params.get("key") for item in request.session.items if hasattr(item, "callspec")}
    return {key: workers.submit(measure, *key, {}) for key in PRODUCT if key in asked}


def budget() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Case -> architecture -> kernel -> resources."""
    read: dict[str, dict[str, dict[str, dict[str, int]]]] = json.loads(BUDGET.read_text())
    return read


def most(found: Measured) -> dict[str, dict[str, int]]:
    """The largest need of each kernel."""
    needs: dict[str, dict[str, int]] = {}
    for kernel, _, used in found:
        before = needs.setdefault(kernel, used)
        needs[kernel] = {what: max(before[what], used[what]) for what in used}
    return needs


def roomy(registers: int) -> int:
    return min(255, -(-registers // 8) * 8 + 8)


@pytest.mark.parametrize("key", PRODUCT, ids=lambda key: f"{key[0]}-sm_{key[1]}")
def test_within_budget(key: tuple[str, int], compiled: Mapping[Any, Future[Measured]], request: Any) -> None:
    case, arch = key
    found = compiled[key].result(timeout=300)
    check(found, arch)
    needs = most(found)
    if request.config.getoption("--write-budget"):
        known = budget()
        known.setdefault(case, {})[str(arch)] = {k: {**n, "registers": roomy(n["registers"])} for k, n in needs.items()}
        BUDGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    allowed = budget().get(case, {}).get(str(arch), {})
    assert set(allowed) == set(needs), f"budget.json has other kernels for {case}; see the top of this file"
    over = {k: (needs[k], allowed[k]) for k in needs for what in needs[k] if needs[k][what] > allowed[k][what]}
    assert not over, f"more than budget.json allows (needs, allowed): {over}"


def test_budget_has_no_rows_without_a_case() -> None:
    assert set(budget()) <= set(CASES)


def tuned() -> list[tuple[str, int, dict[str, int]]]:
    """Every case at the bounds of every entry of its tables."""
    out: list[tuple[str, int, dict[str, int]]] = []
    for case, (_, tables) in CASES.items():
        for arch in ARCHITECTURES:
            for table in tables:
                last: dict[str, int] = {}
                for entry in tuning.entries(table, arch):
                    last = dict(entry.bounds) or {name: size * BEYOND for name, size in last.items()}
                    if (case, arch, last) not in out:
                        out.append((case, arch, last))
    return out


@pytest.mark.full
@pytest.mark.parametrize(("case", "arch", "sizes"), tuned(), ids=str)
def test_tuned_configurations_fit(case: str, arch: int, sizes: dict[str, int], workers: ProcessPoolExecutor) -> None:
    check(workers.submit(measure, case, arch, sizes).result(timeout=300), arch)


def test_every_tuning_table_belongs_to_a_case() -> None:
    used = {table for case in CASES.values() for table in case.tables}
    for arch in ARCHITECTURES:
        assert set(tuning.table(arch)) == used
