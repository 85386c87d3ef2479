"""Cases drawn in the parent, run by one mpirun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from .cases import run_cases
from .launcher import TESTS


def draw(strategy: SearchStrategy[Any], count: int) -> list[Any]:
    """``count`` different-as-possible examples of a strategy, the same in every run."""
    found: list[Any] = []

    @settings(
        max_examples=count,
        database=None,
        derandomize=True,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def ship(
    n: int, target: str, cases: list[Any], *, timeout: float = 60.0, launch: float = 120.0, deadline: float = 20.0
) -> list[list[Any]]:
    """``function(world, case)`` on ``n`` ranks for every case, in one mpirun; ``result[case][rank]``.

    target: ``"tests/ranks/cases_x.py:function"``, relative to the checkout. Cases and results are JSON values.
    timeout, launch, deadline: seconds for a case, for the launch, and for a wait of the world's group.
    Raises AssertionError for the first case that failed on any rank, with that rank's traceback and the case.
    """
    root = TESTS.parent
    path, _, name = target.partition(":")
    if not name or not Path(root, path).is_file():
        raise ValueError(f"target must be 'path/to/file.py:function' relative to {root}, got {target!r}")
    keys = [str(i) for i in range(len(cases))]
    spec = {
        "mode": "ship",
        "target": f"{Path(root, path)}:{name}",
        "deadline": deadline,
        "timeouts": dict.fromkeys(keys, timeout),
        "cases": dict(zip(keys, cases, strict=True)),
    }
    done = run_cases(n, spec, launch_timeout=launch)
    for key, case in zip(keys, cases, strict=True):
        if done[key].outcome != "passed":
            raise AssertionError(f"{target} on {n} ranks, case {json.dumps(case)}:\n{done[key].text()}")
    return [[line["value"] for line in done[key].ranks if line] for key in keys]
