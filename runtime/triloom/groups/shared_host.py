"""Which ranks share a host, and the segments (segments.py) that they make together."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import _C
from ..errors import ConfigError, MismatchError
from . import segments
from .objects import gather_objects
from .shared_sizes import Sizes, sizes_for

if TYPE_CHECKING:
    from .wired import WiredGroup

T = TypeVar("T")


@dataclass(frozen=True)
class SharedMemory:
    """How groups use memory that ranks share. Pass None instead, and they do not.

    hosts: for each rank a number of its host, where the machine is not to be asked (a forced map); must be the
    same on every rank. limit_bytes: memory a group's segment may take (its pages exist once they are used).
    """

    hosts: tuple[int, ...] | None = None
    limit_bytes: int = 256 << 20


class Host:
    """This rank's end of the memory of its host; one for a world and all its splits."""

    def __init__(self, options: SharedMemory, places: Sequence[int], group: WiredGroup, pids: Sequence[int]) -> None:
        self.options = options
        self.places = tuple(places)
        """By rank of the world's group: the number of its host."""
        here = self.places[group.rank]
        self.ranks = [r for r, place in enumerate(self.places) if place == here]
        """Ranks of this host, in order; the index here is a rank's doorbell."""
        own = self.ranks.index(group.rank)
        mine = [pids[r] for r in self.ranks]
        spin = 3e-6 if len(self.ranks) <= len(os.sched_getaffinity(0)) else 0.0

        def engine(fd: int) -> _C.ShmEngine:
            return _C.ShmEngine(fd, own, mine, spin)

        size = _C.ShmEngine.bells_bytes(len(mine))
        alone = len(mine) == 1
        self.engine: _C.ShmEngine | None = None
        self.engine, self.refused = _together(group, self.ranks[0], None if alone else size, engine)

    def channel(self, group: WiredGroup) -> tuple[_C.ShmChannel | None, str]:
        """A segment for a group, if all its members are here; or why there is none. Collective over the group."""
        engine = self.engine
        if len({self.places[m] for m in group.members}) > 1:
            return None, "its ranks are on several hosts"
        if engine is None:
            return None, self.refused or "this host has one rank"
        sizes = sizes_for(group.size, self.options.limit_bytes)
        if isinstance(sizes, str):
            return None, sizes
        bells = [self.ranks.index(m) for m in group.members]

        def channel(fd: int) -> _C.ShmChannel:
            return _C.ShmChannel(engine, fd, _numbers(group.size, sizes), group.rank, bells, group._check)

        return _together(group, 0, _C.ShmChannel.total_bytes(_numbers(group.size, sizes)), channel)


def _numbers(ranks: int, sizes: Sizes) -> tuple[int, int, int, int]:
    return (ranks, sizes.inline_bytes, sizes.block_bytes, sizes.ring_bytes)


def find_host(group: WiredGroup, options: SharedMemory) -> Host:
    """Which ranks share this one's host. Collective over the group, which still talks over its wire.

    Processes share memory here if they run under one kernel and see each other's /proc.
    """
    if options.hosts is not None and len(options.hosts) != group.size:
        raise ConfigError(
            f"rank {group.rank} of group {group.name!r}: hosts={options.hosts} names {len(options.hosts)} ranks, "
            f"the group has {group.size}; give one number for each rank"
        )
    own = [_place(), options.hosts, options.limit_bytes, os.getpid()]
    everyone = gather_objects(group, own)
    told = [list(other[1:3]) for other in everyone]
    if any(other != told[0] for other in told):
        raise MismatchError(
            f"ranks of group {group.name!r} pass different shared=: [hosts, limit_bytes] by rank are {told}"
        )
    names = [other[0] for other in everyone] if options.hosts is None else list(options.hosts)
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    return Host(options, [first[name] for name in names], group, [other[3] for other in everyone])


def _place() -> str:
    """Equal for processes that can open each other's files through /proc."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"process {os.getpid()} on an unknown kernel {time.time_ns()}"


def _together(group: WiredGroup, maker: int, nbytes: int | None, use: Callable[[int], T]) -> tuple[T | None, str]:
    """A segment made by rank ``maker``, used by all ranks that name it, or by none; with the reason.

    Collective over the group; nbytes None takes no part. The file is closed here, mappings stay.
    """
    fd, made = -1, ["", -1, -1]
    if nbytes is not None and group.rank == maker:
        try:
            fd = segments.create(nbytes)
            made = ["", os.getpid(), fd]
        except OSError as error:
            made[0] = f"rank {group.rank} cannot make a segment of {nbytes} bytes: {error}"
    reason, pid, number = gather_objects(group, made)[maker]
    thing: T | None = None
    try:
        if nbytes is not None and not reason:
            if fd < 0:
                fd = segments.attach(pid, number)
            thing = use(fd)
    except (OSError, _C.NativeError) as error:
        reason = f"rank {group.rank} cannot map the segment of rank {maker}: {error}"
    reasons = [text for other, text in gather_objects(group, [maker, reason]) if text and other == maker]
    if fd >= 0:
        os.close(fd)
    return (None, reasons[0]) if reasons else (thing, "")
