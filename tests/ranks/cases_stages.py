"""Runs on the ranks: programs that the verifier accepted, and models with awkward stages against one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from program_edits import interpret_rank
from stage_cases import trained, with_joins
from triloom import boot
from triloom.actions import parse_program
from triloom.groups.solo import Solo


def run(world: boot.World, case: dict[str, Any]) -> list[float]:
    return run_program(world, case["program"]) if "program" in case else run_model(world, **case)


def run_program(world: boot.World, text: str) -> list[float]:
    """The transfers of an accepted program, each tensor the one meant."""
    interpret_rank(world.group, parse_program(text), "independent")
    return []


@cache
def alone(name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    return with_joins(Solo(), 1, "1f1b") if name == "skips" else trained(Solo(), name, 1)[:2]


def run_model(world: boot.World, name: str, schedule: str) -> list[float]:
    """Train on a pipeline of all ranks and alone: the same bits."""
    if name == "skips":
        losses, state = with_joins(world.group, world.size, schedule)
    else:
        losses, state, _ = trained(world.group, name, world.size, schedule=schedule)
    want, params = alone(name)
    assert losses == want
    assert all(torch.equal(state[k], v) for k, v in params.items())
    return losses
