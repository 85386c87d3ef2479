"""One group of two ranks for each direction between neighbours of a pipeline.

On a FIFO lane (a NCCL group's stream) a send waits for the receive issued before it: pipeline
schedules that send both ways over one lane deadlock. Over one communicator and stream per direction
they do not, which the verifier proves as lanes "per_direction".
"""

from __future__ import annotations

from collections.abc import Mapping

from .base import Group

Links = Mapping[tuple[int, str], tuple[Group, int]]
"""By (peer's rank, "send" or "recv"): the group, and the peer's rank in it."""


def phases(size: int) -> list[list[tuple[int, int]]]:
    """The neighbours on a ring of ``size`` ranks, in rounds in which every rank is in one pair at most."""
    if size < 2:
        return []
    ring = [(r, r + 1) for r in range(size - 1)] + ([(size - 1, 0)] if size > 2 else [])
    even = [pair for r, pair in enumerate(ring[: size - 1]) if r % 2 == 0]
    odd = [pair for r, pair in enumerate(ring[: size - 1]) if r % 2 == 1]
    closing = ring[size - 1 :]
    if size % 2 == 0:  # of an even ring the closing pair meets no odd one
        odd, closing = odd + closing, []
    return [round for round in (even, odd, closing) if round]


def make_links(pp: Group) -> Links:
    """Groups for every direction between ring neighbours of ``pp``, connected; collective over ``pp``."""
    links: dict[tuple[int, str], tuple[Group, int]] = {}
    for number, pairs in enumerate(phases(pp.size)):
        for way, ordered in (("down", pairs), ("up", [(b, a) for a, b in pairs])):
            group = pp.split([list(pair) for pair in ordered], f"{pp.name}-link{number}-{way}")
            mine = next((pair for pair in ordered if pp.rank in pair), None)
            if mine is None:
                continue
            sender, receiver = mine
            group.warm([(0, 1)])  # the sender is rank 0
            if pp.rank == sender:
                links[receiver, "send"] = group, 1
            else:
                links[sender, "recv"] = group, 0
    return links
