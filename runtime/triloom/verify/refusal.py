"""How a program is refused: one sentence that says why, and the grid around the culprits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from ..actions import Program
from ..errors import ProgramError
from ..grid import Place, grid


def refuse(program: Program, why: str, marks: Iterable[Place] = ()) -> NoReturn:
    """Raise ProgramError with the reason and the rank-by-step grid, the places in ``marks`` marked."""
    raise ProgramError(f"program {program.name!r} is refused: {why}\n{grid(program, marks)}")


def at(program: Program, place: Place) -> str:
    """``SEND:act0@1>1 (rank 0, step 6)``"""
    rank, step = place
    return f"{program.ranks[rank][step]} (rank {rank}, step {step})"
