"""Setting up on many ranks: the same problem is told once, a problem of one rank stops all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from .errors import ConfigError, TriloomError
from .groups.base import Group
from .groups.fingerprint import rank_list
from .groups.objects import gather_objects

T = TypeVar("T")


class SetupError(ConfigError):
    """The run cannot start; raised on every rank, with the same message."""


def together(group: Group, work: Callable[[], T], error: type[TriloomError] = SetupError) -> T:
    """Run ``work``, which must not communicate, on every rank of ``group``; collective.

    If it raises a TriloomError on any rank, every rank raises ``error`` with the message of the
    lowest one, naming the ranks it happened on unless it happened on all.
    """
    result: T | None = None
    said: str | None = None
    try:
        result = work()
    except TriloomError as problem:
        said = str(problem)
    everyone = gather_objects(group, said)
    failed = [rank for rank, text in enumerate(everyone) if text is not None]
    if not failed:
        return result  # type: ignore[return-value]  # set: work() returned on every rank
    text = everyone[failed[0]]
    same = [rank for rank in failed if everyone[rank] == text]
    raise error(text if len(same) == group.size else f"{rank_list(same, group.members)}: {text}")


def agree_on(group: Group, values: Mapping[str, str], way_out: str) -> None:
    """Raise SetupError on every rank, naming keys, ranks and values, unless ``values`` are the same everywhere."""
    everyone = gather_objects(group, dict(values))
    problems = []
    for key in sorted({key for one in everyone for key in one}):
        by_value: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            by_value.setdefault(one.get(key, "nothing"), []).append(rank)
        if len(by_value) > 1:
            sides = "; ".join(f"{rank_list(ranks, group.members)}: {value}" for value, ranks in by_value.items())
            problems.append(f"the ranks disagree on {key}: {sides}; {way_out}")
    if problems:
        raise SetupError("\n".join(problems))
