"""Schedules: in which order each pipeline coordinate computes. Pure, and compute actions only.

A schedule is a function of the number of stages and of microbatches. It writes what the paper
draws; transfers and state are added by passes. Backwards run in microbatch order in every
schedule, because weight gradients are summed in microbatch order whatever the schedule.
"""

from __future__ import annotations

from collections.abc import Callable

from .actions import Action, Program, compute
from .errors import ConfigError

Schedule = Callable[[int, int], Program]
"""``schedule(stages, microbatches)``: a Program of compute actions. Both numbers are at least 1."""


def gpipe(stages: int, microbatches: int) -> Program:
    """All forwards, then all backwards (Huang et al., GPipe, arXiv 1811.06965, figure 2c).

    Every microbatch is in flight at once; bubble (p-1)/(m+p-1) of the step.
    """
    _check_sizes("gpipe", stages, microbatches)

    def row(stage: int) -> tuple[Action, ...]:
        forwards = [compute("F", stage, m) for m in range(microbatches)]
        backwards = [compute("BW", stage, m) for m in range(microbatches)]
        return (*forwards, *backwards)

    return Program(tuple(map(row, range(stages))), tuple(range(stages)), microbatches, "gpipe")


def one_f_one_b(stages: int, microbatches: int) -> Program:
    """Warm-up forwards, then one forward, one backward in turn, then the rest of the backwards.

    PipeDream-flush (Narayanan et al., arXiv 2006.09503, figure 1b; arXiv 2104.04473, figure 4 top).
    Stage s holds at most min(p - s, m) microbatches; same bubble as GPipe.
    """
    _check_sizes("1f1b", stages, microbatches)

    def row(stage: int) -> tuple[Action, ...]:
        warmup = min(stages - 1 - stage, microbatches)
        actions = [compute("F", stage, m) for m in range(warmup)]
        for m in range(warmup, microbatches):
            actions += [compute("F", stage, m), compute("BW", stage, m - warmup)]
        actions += [compute("BW", stage, m) for m in range(microbatches - warmup, microbatches)]
        return tuple(actions)

    return Program(tuple(map(row, range(stages))), tuple(range(stages)), microbatches, "1f1b")


def forward_only(stages: int, microbatches: int) -> Program:
    """Forwards in microbatch order: evaluation and inference."""
    _check_sizes("forward", stages, microbatches)
    rows = tuple(tuple(compute("F", s, m) for m in range(microbatches)) for s in range(stages))
    return Program(rows, tuple(range(stages)), microbatches, "forward")


NAMED: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b, "forward": forward_only}


def _check_sizes(name: str, stages: int, microbatches: int) -> None:
    for what, value in (("stages", stages), ("microbatches", microbatches)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"schedule {name!r} needs {what} to be a positive integer, got {value!r}")
