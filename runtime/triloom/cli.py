"""The ``triloom`` command. Torch is imported by the commands that train, not by those that only plan."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import __version__
from .advice import advice
from .commands.bench import run_bench
from .commands.checkpoint import run_checkpoint
from .commands.doctor import run_doctor
from .commands.schedule import run_schedule
from .commands.timeline import run_timeline
from .commands.verify import run_verify
from .config import Config, Loaded, help_fields, load
from .errors import CheckpointError, ConfigError, DivergedError, ProgramError, TriloomError

USAGE = """\
triloom trains one model on many ranks: tensor, pipeline and data parallelism under mpirun.

  mpirun -n 4 triloom train [--config run.toml] [--parallel.tp 2 ...]   train; see triloom train --help
  triloom schedule NAME --stages 8 --micro 32 ...   draw a pipeline schedule; see triloom schedule --help
  triloom data inspect PATH ...   what a text or a token file holds; tokenize it; see triloom data --help
  triloom timeline RUN            draw a measured step under its simulation; see triloom timeline --help
  triloom verify ...              train a few steps on a mesh and on one rank, and compare; see triloom verify --help
  triloom checkpoint ...          look at checkpoints and verify them; see triloom checkpoint --help
  triloom doctor [FOLDER]         what this machine offers and lacks; under mpirun, how the ranks talk
  triloom demo [--dir FOLDER]     train a small transformer on 4 ranks in two ways, and compare (2 minutes)
  triloom bench [NAME ...]        measure against peers, e.g. bench comm; see triloom bench --help
  triloom --version               print the version
"""

TRAIN_USAGE = """\
triloom train: train a decoder on text or tokens.

  mpirun -n 4 triloom train --config run.toml --parallel.tp 2 --train.steps=500

  --config FILE
      TOML file with a table per section below. The command line overrides it.
  --resume [RUN]
      Go on with a run: RUN is its directory, whose config.toml is taken unless --config is given, or a checkpoint
      of it. Without RUN: with that in run.dir, from the beginning if it has no checkpoint yet.
  --dry-run [RANKS]
      Check everything, print the resolved configuration and the plan, and stop. RANKS: plan for so many
      ranks, without mpirun. The output is a file for --config.
  --help
      This text.

Told to stop by SIGUSR1, SIGTERM or Ctrl-C, all ranks finish the step, save and leave with exit code 75; a second signal
ends them at once. mpirun hands SIGUSR1 on and returns 75. Told SIGTERM or Ctrl-C itself, that of Open MPI kills the
ranks a moment later and returns 1: send it SIGUSR1 (kill -USR1; Slurm: sbatch --signal=USR1@120).

Every key is written --section.key value or --section.key=value; a bare --section.key means true.
"""

OK, FAILED, REFUSED, STOPPED = 0, 1, 2, 75
"""Exit codes: refused means that nothing was started, stopped that a signal ended the run, its state saved (EX_TEMPFAIL
of sysexits.h: try again later)."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``triloom train`` that are not keys of the configuration."""

    config: str | None = None
    dry_run: bool = False
    ranks: int | None = None
    words: tuple[str, ...] = ()
    """The rest: overrides."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words in (["--version"], ["-V"]):
        print(f"triloom {__version__}")
        return OK
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return OK if words else REFUSED
    command = COMMANDS.get(words[0])
    if command is None:
        return _refuse(f"{words[0]!r} is not a command; commands are {', '.join(COMMANDS)} (triloom --help)")
    try:
        return command(words[1:])
    except (ConfigError, ProgramError) as error:  # found without a world: by one process, or before it is connected
        return _refuse(error)
    except BrokenPipeError:  # whoever read the output (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def run_train(words: Sequence[str]) -> int:
    """``triloom train``."""
    if "--help" in words or "-h" in words:
        return _print_once(TRAIN_USAGE + help_fields())
    from . import boot
    from .dryrun import describe
    from .together import SetupError, together
    from .train import prepare_together, train

    options, loaded, error = _read(words)
    if options.ranks is not None:
        return _dry_run(loaded, error, options.ranks)
    with boot.init(threads=loaded.config.train.threads, deadline=loaded.config.train.deadline) as world:
        try:
            together(world.group, lambda: _raise(error))
            if options.dry_run:
                job = prepare_together(loaded.config, world, loaded.sources, sys.stderr, checked=False)
                if world.rank == 0:
                    print(describe(job))
                return OK
            result = train(loaded.config, world, sources=loaded.sources)
        except (SetupError, ProgramError, DivergedError, CheckpointError) as problem:  # on every rank alike: told once
            if world.rank == 0:
                _refuse(problem)
            return FAILED if isinstance(problem, DivergedError | CheckpointError) else REFUSED
        except Exception as problem:  # the traceback ends with its notes, and it ends the job
            problem.add_note(advice(problem))
            raise
    return OK if result.stopped is None else STOPPED


def read_options(words: Sequence[str]) -> TrainOptions:
    """Take ``--config`` and ``--dry-run`` out of the words; raises ConfigError."""
    rest, overrides = list(words), list[str]()
    config: str | None = None
    resume: str | None = None
    dry_run, ranks = False, None
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name == "--config":
            if not equals and not rest:
                raise ConfigError("--config needs the path of a TOML file")
            if config is not None:
                raise ConfigError("--config is given twice; keep one")
            config = value if equals else rest.pop(0)
        elif name == "--resume":
            if resume is not None:
                raise ConfigError("--resume is given twice; keep one")
            resume = value if equals or not rest or rest[0].startswith("--") else rest.pop(0)
        elif name == "--dry-run":
            dry_run = True
            if not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)
            if value and (not value.isdigit() or int(value) < 1):
                raise ConfigError(f"--dry-run takes a number of ranks, got {value!r}")
            ranks = int(value) if value else None
        else:
            overrides.append(word)
    if resume is not None:
        overrides.append(f"--run.resume={resume or 'auto'}")
    return TrainOptions(config or _config_of(resume), dry_run, ranks, tuple(overrides))


def _config_of(resume: str | None) -> str | None:
    """The config.toml of a run directory, or of that which a checkpoint is in."""
    place = Path(resume or "").expanduser()
    found = [p / "config.toml" for p in (place, *place.absolute().parents[:2]) if (p / "config.toml").is_file()]
    return str(found[0]) if resume and found else None


def _read(words: Sequence[str]) -> tuple[TrainOptions, Loaded, ConfigError | None]:
    """Options and configuration; a problem is kept until the ranks can agree on who tells it."""
    options, loaded = TrainOptions(), Loaded(Config(), {})
    try:
        options = read_options(words)
        loaded = load(options.words, options.config)
    except ConfigError as error:
        return options, loaded, error
    return options, loaded, None


def _dry_run(loaded: Loaded, error: ConfigError | None, ranks: int) -> int:
    from .dryrun import describe
    from .train import prepare

    _raise(error)
    print(describe(prepare(loaded.config, ranks, loaded.sources)))
    return OK


def run_demo(words: Sequence[str]) -> int:
    """``triloom demo``."""
    from . import boot
    from .demo import demo

    here = boot.announced()
    if here.size > 1:
        text = f"triloom demo starts its own ranks; run it once, not on the {here.size} that {here.launcher} started"
        return _refuse(text) if here.rank == "0" else REFUSED
    folder: str | None = None
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name in ("-h", "--help"):
            print(USAGE, end="")
            return OK
        if name != "--dir" or (not equals and not rest):
            raise ConfigError(f"triloom demo knows only --dir FOLDER, got {name!r}")
        folder = value if equals else rest.pop(0)
    return OK if demo(folder) else FAILED


def run_data(words: Sequence[str]) -> int:
    """``triloom data``."""
    from .commands.data import run_data as run

    return run(words)


def _print_once(text: str) -> int:
    """Print on rank 0, or without asking where the launcher cannot be told: a text for people needs none."""
    from . import boot

    try:
        shown = text if boot.announced().rank in ("0", "?") else ""
    except ConfigError:
        shown = text
    print(shown, end="\n" if shown else "")
    return OK


def _raise(error: TriloomError | None) -> None:
    if error is not None:
        raise error


def _refuse(problem: str | TriloomError) -> int:
    """Say what is wrong, on stderr: a line per problem, or one problem and its grid."""
    lines = str(problem).splitlines()
    grid = len(lines) > 1 and any(line.startswith("rank 0") for line in lines)
    head = "triloom: " if len(lines) == 1 or grid else f"triloom: {len(lines)} problems\n  "
    print(head + ("\n" if grid else "\n  ").join(lines), file=sys.stderr, flush=True)
    return REFUSED


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": run_train,
    "schedule": run_schedule,
    "timeline": run_timeline,
    "verify": run_verify,
    "data": run_data,
    "checkpoint": run_checkpoint,
    "doctor": run_doctor,
    "demo": run_demo,
    "bench": run_bench,
}

if __name__ == "__main__":
    sys.exit(main())
