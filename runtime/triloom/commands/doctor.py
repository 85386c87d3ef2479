"""``triloom doctor``: what this machine offers and lacks; under a launcher, how the ranks talk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.schema import Section
from ..errors import ConfigError
from .options import describe, read

USAGE = """\
triloom doctor [FOLDER]: what this machine offers, what is missing, and the command that gets it.

  triloom doctor
  triloom doctor /scratch                also: can FOLDER take offloaded state (the current one if left out)
  mpirun -n 4 triloom doctor             also: do the ranks agree, and how fast do they talk

The exit code is 1 if something is missing.

"""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(Section):
    """Options of ``triloom doctor``."""

    json: bool = False
    """Print one JSON object instead of text."""


def run_doctor(words: Sequence[str]) -> int:
    """The command; returns the exit code."""
    from .. import boot
    from ..doctor import Place, as_json, as_text, examine

    here = boot.announced()
    if "--help" in words or "-h" in words:
        print(USAGE + describe(DoctorOptions) if here.rank in ("0", "?") else "", end="")
        return 0
    options, folders = read(DoctorOptions, words)
    if len(folders) > 1:
        raise ConfigError(f"triloom doctor takes one folder, got {' '.join(folders)}")
    folder = Path(folders[0]) if folders else Path()
    if not folder.is_dir():
        raise ConfigError(f"triloom doctor: {str(folder)!r} is not a folder")
    # No launcher may mean a shell inside a Slurm allocation, which init refuses: no reason not to look at it.
    with boot.init(launcher="one" if here.launcher == "python" else None, deadline=60.0) as world:
        lines = examine(Place(folder, world))
        if world.rank == 0:
            print(as_json(lines) if options.json else as_text(lines), file=sys.stdout, flush=True)
    return int(any(line.verdict == "missing" for line in lines))
