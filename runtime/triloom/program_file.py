"""Programs in files: written by hand or saved, loaded, checked for their shape, completed. Pure.

The format is that of :meth:`Program.to_csv`: a line ``# NAME microbatches=M stages=0/1/...`` (the
pipeline coordinate of every stage), then one row of actions per pipeline coordinate. A file may hold
compute actions only, as a paper draws a schedule; then transfers and state are added by the passes,
as to a schedule that triloom generates. A file with transfers must have all of them.
"""

from __future__ import annotations

from pathlib import Path

from .actions import COMPUTE, TRANSFER, Program, parse_action, parse_program
from .errors import ConfigError, ProgramError
from .passes import StateLayout, add_communication, add_state
from .placement import Placement
from .verify import Verdict, verify

EXAMPLE = "# NAME microbatches=M stages=0/1/..."


def load_program(path: str | Path) -> Program:
    """The program of a file. Raises ConfigError naming file, line and rank for one that cannot be read.

    What its actions mean is the verifier's business.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(
            f"the program {str(path)!r} cannot be read: {why}; give a file that starts with {EXAMPLE!r}"
        ) from None
    lines = text.splitlines()
    for number, line in enumerate(lines[1:], 2):
        for place, word in enumerate(filter(str.strip, line.split(",")), 1):
            try:
                parse_action(word)
            except ProgramError as error:
                raise ConfigError(f"{path}:{number} (rank {number - 2}, action {place}): {error}") from None
    try:
        program = parse_program(text)
    except ProgramError as error:
        raise ConfigError(f"{path}:1: {error}") from None
    _check_rows(path, program)
    return program


def _check_rows(path: str | Path, program: Program) -> None:
    wanted = max(program.stages) + 1
    if len(program.ranks) != wanted:
        raise ConfigError(
            f"{path}: the first line puts stages on coordinates 0 to {wanted - 1}, but {len(program.ranks)} rows of "
            "actions follow; write one row per coordinate"
        )
    if program.microbatches < 1:
        raise ConfigError(f"{path}:1: microbatches={program.microbatches}; a program needs at least one")
    for rank, row in enumerate(program.ranks):
        for place, action in enumerate(row, 1):
            if action.op in COMPUTE and action.subject.kind == "stage" and not _known(program, action.subject.index):
                raise ConfigError(
                    f"{path}:{rank + 2} (rank {rank}, action {place}): {action} is of a stage that the first line does "
                    f"not name; it has stages 0 to {len(program.stages) - 1}"
                )


def _known(program: Program, stage: int | None) -> bool:
    return stage is not None and 0 <= stage < len(program.stages)


def has_transfers(program: Program) -> bool:
    return any(a.op in TRANSFER for row in program.ranks for a in row)


def has_state(program: Program) -> bool:
    return any(a.op not in COMPUTE + TRANSFER for row in program.ranks for a in row)


def with_transfers(program: Program) -> Program:
    """The program with its transfers: its own, or added."""
    return program if has_transfers(program) or has_state(program) else add_communication(program)


def complete(program: Program, layout: StateLayout, placement: Placement) -> Program:
    """The program with transfers and state actions: its own, or added to what computes only."""
    program = with_transfers(program)
    return program if has_state(program) else add_state(program, layout, placement)


def check(program: Program) -> Verdict:
    """Verify a program, without the state actions that it does not have yet. Raises ProgramError with the grid."""
    try:
        whole = with_transfers(program)
    except ProgramError:
        verify(program)  # knows better what is missing than the pass that missed it
        raise
    return verify(whole)
