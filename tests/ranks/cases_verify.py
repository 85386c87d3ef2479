"""Runs on the ranks: triloom verify as a function, and a Hugging Face folder through an engine."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from hf_cases import converted
from triloom.boot import World
from triloom.commands.verify import VerifyOptions, verify
from triloom.config import load


def verified(world: World, words: dict[str, Any]) -> list[Any]:
    """Exit code, and on rank 0 the report."""
    first = load(words["first"].split()).config
    second = None if words["second"] is None else load(words["second"].split()).config
    with redirect_stdout(io.StringIO()) as said:
        code = verify(world, VerifyOptions(json=True, steps=2), first, second)
    return [code, json.loads(said.getvalue()) if world.rank == 0 else said.getvalue()]


def through(world: World, case: dict[str, Any]) -> dict[str, Any]:
    """Loss, and the norm of each gradient under its name there."""
    got = converted(world.group, Path(case["folder"]), Path(case["out"]), case["mesh"], **case["options"])
    return {"loss": got["loss"], "norms": {name: float(g.norm()) for name, g in got["grads"].items()}}


def run(world: World, case: dict[str, Any]) -> Any:
    return {"verified": verified, "through": through}[case["what"]](world, case["case"])
