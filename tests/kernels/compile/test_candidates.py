"""What the tuner tries compiles and fits a Hopper GPU, so that a tuning measures and does not only refuse."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from kernel_cases.cubin_cases import CASES, Measured, check, measure
from triloom_kernels import tuning
from triloom_kernels.tune.candidates import candidates
from triloom_kernels.tune.work import WORK, sizes_of

ARCH = 90


def case_of(table: str) -> str:
    """The first case that reads the table alone, or else the first that reads it."""
    reading = [name for name, case in CASES.items() if table in case.tables]
    return min(reading, key=lambda name: len(CASES[name].tables))


def product() -> list[tuple[str, dict[str, int]]]:
    return [(table, sizes_of(table, entry.bounds)) for table in WORK for entry in tuning.entries(table, ARCH)]


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def tried(table: str, options: Mapping[str, Any], sizes: Mapping[str, int]) -> Measured:
    """Runs in a worker process."""
    with tuning.trying(table, options) as trial:
        found = measure(case_of(table), ARCH, sizes)
    assert trial.asked, f"no kernel of {case_of(table)} reads {table}"
    return found


@pytest.mark.full
@pytest.mark.parametrize(("table", "sizes"), product(), ids=str)
def test_candidates_fit(table: str, sizes: dict[str, int], workers: ProcessPoolExecutor) -> None:
    under_way = [workers.submit(tried, table, options, sizes) for options in candidates(table, sizes)]
    for future in under_way:
        check(future.result(timeout=900), ARCH)


def test_every_table_has_a_case() -> None:
    assert all(case_of(table) for table in WORK)
