"""Runs on the ranks: a named schedule against 1F1B on the same mesh, bit for bit."""

from __future__ import annotations

from functools import cache
from typing import Any

from generator_cases import Run, same_bits, train
from triloom import boot
from triloom.groups.base import Group
from triloom.schedules import NAMED


@cache
def one_f_one_b(group: Group, run: Run) -> Any:
    return train(group, run, NAMED["1f1b"])


def run(world: boot.World, values: dict[str, Any]) -> list[float]:
    """Train on the mesh under both schedules; returns the losses, which must be the same on every rank."""
    case = Run(**values["run"])
    outcome = train(world.group, case, NAMED[values["schedule"]])
    same_bits(outcome, one_f_one_b(world.group, case))
    return outcome[0]
