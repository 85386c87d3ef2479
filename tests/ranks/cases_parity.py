"""Runs on the ranks: one parity case, compared with one rank on the spot."""

from __future__ import annotations

from functools import cache
from typing import Any

from parity_cases import Case, Outcome, compare, train
from triloom import boot
from triloom.groups.solo import Solo

TOLERANCE = {"float64": (1e-11, 1e-12), "float32": (2e-4, 2e-5)}
"""As in tests/pure/test_parity.py."""


@cache
def alone(case: Case) -> Outcome:
    return train(Solo(), case)


def run(world: boot.World, values: dict[str, Any]) -> list[float]:
    """Train on the mesh and alone; returns the losses, which must be the same on every rank."""
    case = Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    outcome = train(world.group, case)
    rtol, atol = TOLERANCE[case.dtype]
    compare(outcome, alone(case.alone()), rtol=rtol, atol=atol)
    return outcome.losses
