"""Lanes: how posted communication progresses on a rank. Pure.

An operation posted on a lane starts when the operation before it on the same lane is over.
Operations on different lanes do not wait for each other. What a Group or a device gives is one row
of the table ``NAMED``; a function of one's own works too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from .errors import ConfigError


class Post(NamedTuple):
    """An operation that a rank posts.

    op: ``SEND``, ``RECV`` or the state action that posts a collective. peer and direction (``out``
    or ``in``) belong to transfers, group (its name) to collectives.
    """

    rank: int
    op: str
    peer: int | None = None
    direction: Literal["out", "in"] | None = None
    group: str | None = None


Lane = tuple[object, ...] | Literal["own", "main"]
"""``own``: a lane for this operation alone. ``main``: the rank waits until the operation is over.
A tuple: first in, first out, with the rank's other operations of the same tuple."""

Lanes = Callable[[Post], Lane]


def independent(post: Post) -> Lane:
    """Nothing waits for anything else: MPI nonblocking operations, one network queue each."""
    return "own"


def per_direction(post: Post) -> Lane:
    """One lane per peer and direction, one per group: a NCCL communicator and stream per direction."""
    return (post.peer, post.direction, post.group)


def per_peer(post: Post) -> Lane:
    """One lane per peer for both directions, one per group: a NCCL communicator per pair of ranks."""
    return (post.peer, post.group)


def per_rank(post: Post) -> Lane:
    """One lane for everything: a thread that runs blocking calls, a single communication stream."""
    return ("rank",)


def blocking(post: Post) -> Lane:
    """The rank itself waits: blocking MPI_Send and MPI_Recv without buffering."""
    return "main"


NAMED: dict[str, Lanes] = {f.__name__: f for f in (independent, per_direction, per_peer, per_rank, blocking)}


def find_lanes(lanes: str | Lanes) -> tuple[str, Lanes]:
    """Name and function of a lane description; raises ConfigError for an unknown name."""
    if callable(lanes):
        return getattr(lanes, "__name__", "custom"), lanes
    if lanes not in NAMED:
        raise ConfigError(f"lanes {lanes!r} is not one of {', '.join(NAMED)}, nor a function of a Post")
    return lanes, NAMED[lanes]
