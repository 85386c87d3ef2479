"""What to do about an error that nobody foresaw: the last line that a failed run prints, below the traceback."""

from __future__ import annotations

import errno
from collections.abc import Callable

from .errors import DeadlineError, DeadlockError, GroupError, MismatchError

GO_ON = "then go on from the last checkpoint, if one was written: triloom train --resume RUN"


def _out_of_memory(error: BaseException) -> bool:
    """Of the host or of a GPU; torch says it in words."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


def _out_of_room(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


ADVICE: tuple[tuple[Callable[[BaseException], bool], str], ...] = (
    (
        lambda e: isinstance(e, DeadlineError | DeadlockError),
        "look at the ranks named above, one of which hung, ended or did something else; a longer "
        "train.deadline helps if they were only slow",
    ),
    (
        lambda e: isinstance(e, MismatchError),
        "start every rank with the same program and configuration, and let units communicate on every rank alike",
    ),
    (
        lambda e: isinstance(e, GroupError),
        "look at the first rank that said something, and at the network",
    ),
    (
        _out_of_memory,
        "see with --dry-run what each rank holds; raise schedule.microbatches, lower train.batch, recompute with "
        "placement.activations, or shard with placement.name = zero3",
    ),
    (_out_of_room, "make room on the disk of the file named above"),
    (lambda e: isinstance(e, OSError), "look at the file or host named above"),
)
"""Whether it is about an error, and what to do; the first that is."""

OTHERWISE = "read the end of the traceback; if it is in triloom and not in code of yours, report it with config.toml"


def advice(error: BaseException) -> str:
    """One line."""
    text = next((text for fits, text in ADVICE if fits(error)), OTHERWISE)
    return f"what to do: {text}; {GO_ON}"
