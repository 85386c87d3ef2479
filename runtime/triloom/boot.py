"""Where a process learns which rank it is: the only room that reads the environment.

``init`` finds the launcher, connects to the other ranks, divides the cores, picks the device and
installs the exception hooks. Everything it finds can be passed instead: a group, an mpi4py communicator;
``adopt`` takes the ranks of a torch.distributed world. Importing this module changes nothing; MPI is imported
and initialised by ``init`` and finalised by ``World.close``.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType, TracebackType
from typing import Any

import torch

from . import _C
from .connect import CONNECT, Connection, Talk, connect_adopted, connect_comm
from .cores import affinity, cpu_quota, share_cores
from .errors import ConfigError
from .gpu_links import find_links, visible_gpus
from .groups.base import Group
from .groups.objects import gather_objects
from .hooks import Hooks, exit_code
from .launchers import announced_rank, find_launcher
from .topology import Topology, forced_topology, make_topology, node_key

KEPT_HEAP = (1 << 30, 32 << 20)
"""Freed bytes the C library may keep, and the largest block it takes from the heap. A step frees at the end of
each unit what the next one allocates: with glibc's defaults the top of the heap goes back to the system and
comes again as page faults (measured: 800 to 18,000 a step, 5% of it and more). Costs up to the first number of
memory after the peak; changes no result."""


@dataclass(frozen=True)
class World:
    """All ranks of the job, seen from one of them. A context manager that closes on a clean end.

    Two worlds are equal when they describe the same place, whichever group they talk through.
    """

    rank: int
    size: int
    local_rank: int
    """Rank among the ranks of this host."""
    local_size: int
    group: Group = field(compare=False)
    device: torch.device
    threads: int
    """Threads that torch and the native kernels of this rank may use."""
    launcher: str
    """Name of the row of launchers.LAUNCHERS that started the job, or "comm", "adopted", "given"."""
    topology: Topology
    _lifetime: Lifetime | None = field(default=None, compare=False, repr=False)

    def close(self) -> None:
        """Wait for all ranks, then release the group, MPI (if this world started it) and the hooks.

        Raises DeadlineError naming the ranks that did not come. Closing twice is harmless.
        """
        if self._lifetime is not None:
            self._lifetime.end(self.group)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        # After an error nothing is closed: MPI_Finalize would wait for ever for ranks that wait for
        # this one. The error travels on; if nobody handles it, the hooks take the job down.
        code = 0 if error is None else exit_code(error)
        if code == 0:
            self.close()
        elif self._lifetime is not None:
            self._lifetime.failed(code)


class Lifetime:
    """What a world must undo when it ends."""

    def __init__(self, hooks: Hooks | None, finalize: Callable[[], None] | None) -> None:
        self._hooks = hooks
        self._finalize = finalize
        self._open = True

    def failed(self, code: int) -> None:
        """The program leaves with an error that stands for this exit code."""
        if self._hooks is not None:
            self._hooks.code = code

    def end(self, group: Group) -> None:
        if not self._open:
            return
        group.barrier().wait()
        self._open = False
        group.close()
        if self._finalize is not None:
            self._finalize()
        if self._hooks is not None:
            self._hooks.restore()


@dataclass(frozen=True)
class Announced:
    """What a launcher says of this process before anything is connected; rank "?" if it does not say."""

    launcher: str
    size: int
    rank: str


def announced(environ: Mapping[str, str] | None = None) -> Announced:
    """Read launcher, world size and rank without connecting: ("python", 1, "?") if no launcher started this process.

    A shell inside a Slurm allocation was not started by a launcher, whatever the allocation's size.
    """
    env = os.environ if environ is None else environ
    row, size = find_launcher(env)
    return Announced(row.name, size, announced_rank(row, env))


def init(
    *,
    launcher: str | None = None,
    comm: Any = None,
    group: Group | None = None,
    hosts: Sequence[str] | None = None,
    local_rank: int | None = None,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    deadline: float = 600.0,
    shared_memory: bool = True,
    hooks: bool = True,
    environ: Mapping[str, str] | None = None,
) -> World:
    """Find out who this rank is and connect it to the others; collective over all ranks.

    launcher: name of a row of launchers.LAUNCHERS; None finds it in the environment.
    comm: an mpi4py communicator whose ranks to use instead; it is duplicated and stays the caller's, as does MPI.
    group: ranks to use instead of a launcher's; errors on one rank end only its own process.
    hosts: the host of each rank, instead of what is found: ranks with the same one count as one node.
    local_rank, local_size: rank and ranks of this host; None takes the topology's.
    device, threads: None takes this rank's GPU (or the CPU) and its share of the host's cores. torch's
        thread count, and for a GPU torch's current device, are set accordingly.
    deadline: seconds a wait of the group may take by default.
    shared_memory: ranks of one host talk through it; if not, through the launcher's transport (MPI, gloo).
    hooks: install the exception hooks (see triloom.hooks).
    environ: read instead of the process's environment.

    Called again, it gives an equal world and leaves MPI as it is; the world that initialised MPI must be closed last.
    Raises ConfigError if the launcher and MPI disagree or a value cannot work.
    """
    talk = _talk(deadline, shared_memory)
    env = os.environ if environ is None else environ
    given = [name for name, value in (("launcher", launcher), ("comm", comm), ("group", group)) if value is not None]
    if len(given) > 1:
        raise ConfigError(f"init takes the ranks from one of launcher, comm and group, got {' and '.join(given)}")
    if group is not None:
        name, connection = "given", Connection(group)
    elif comm is not None:
        name, connection = "comm", connect_comm(comm, talk)
    else:
        row, expected = find_launcher(env, launcher)
        name, connection = row.name, CONNECT[row.transport](row, expected, talk, env)
    return _world(name, connection, env, Wishes(hosts, local_rank, local_size, device, threads, hooks))


def adopt(
    distributed: ModuleType | Any,
    *,
    hosts: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    deadline: float = 600.0,
    shared_memory: bool = True,
    hooks: bool = False,
    environ: Mapping[str, str] | None = None,
) -> World:
    """The ranks of a torch.distributed world that the program has initialised; collective over them.

    distributed: ``torch.distributed`` itself, or one of its process groups, of any backend. It is used to find the
        ranks and for nothing else: triloom talks over connections of its own, and ``World.close`` leaves it open.
    hooks: off, since the program is its owner's; torchrun ends the other ranks when one fails.

    The other arguments are those of init. Raises ConfigError if torch.distributed is not initialised.
    """
    talk = _talk(deadline, shared_memory)
    env = os.environ if environ is None else environ
    connection = connect_adopted(distributed, talk)
    return _world("adopted", connection, env, Wishes(hosts, None, None, device, threads, hooks))


@dataclass(frozen=True)
class Wishes:
    """What the caller of init passed, None where it is to be found out."""

    hosts: Sequence[str] | None
    local_rank: int | None
    local_size: int | None
    device: torch.device | str | None
    threads: int | None
    hooks: bool


def _world(name: str, connection: Connection, env: Mapping[str, str], wishes: Wishes) -> World:
    group = connection.group
    gpus = visible_gpus() if wishes.device is None or torch.device(wishes.device).type == "cuda" else []
    everyone = gather_objects(group, [node_key(), socket.gethostname(), sorted(affinity()), gpus])
    if wishes.hosts is None:
        topology = make_topology([told[0] for told in everyone], [told[1] for told in everyone])
    else:
        topology = forced_topology(wishes.hosts, group.size)
    mates = topology.local(group.rank)
    place = mates.index(group.rank)
    local_rank = place if wishes.local_rank is None else wishes.local_rank
    device = choose_device(wishes.device, local_rank)
    topology = with_links(topology, group, [told[3] for told in everyone], device)
    hooks = _hooks(connection) if wishes.hooks else None
    world = World(
        rank=group.rank,
        size=group.size,
        local_rank=local_rank,
        local_size=len(mates) if wishes.local_size is None else wishes.local_size,
        group=group,
        device=device,
        threads=choose_threads(wishes.threads, [frozenset(everyone[r][2]) for r in mates], place, env),
        launcher=name,
        topology=topology,
        _lifetime=Lifetime(hooks, connection.finalize),
    )
    if not 0 <= world.local_rank < world.local_size:
        raise ConfigError(f"rank {world.rank}: local_rank={world.local_rank} is not in local_size={world.local_size}")
    torch.set_num_threads(world.threads)
    _C.keep_heap(*KEPT_HEAP)
    if hooks is not None:
        hooks.install()
    return world


def with_links(topology: Topology, group: Group, gpus: Sequence[list[str]], device: torch.device) -> Topology:
    """The topology with the links of the ranks' GPUs; collective if any rank sees a GPU (``gpus``: those each sees)."""
    if group.size == 1 or not any(gpus):
        return topology
    mine = gpus[group.rank][device.index or 0] if device.type == "cuda" else ""
    return replace(topology, links=find_links(group, gather_objects(group, mine), topology.node))


def choose_threads(threads: int | None, cores: Sequence[frozenset[str]], place: int, env: Mapping[str, str]) -> int:
    """``threads`` if given, else OMP_NUM_THREADS if it is set, else this rank's share of the cores.

    torchrun sets it to 1 for several ranks: pass ``threads`` there, or set it yourself.
    cores: of the ranks of this host. place: this rank among them.
    """
    if threads is None and env.get("OMP_NUM_THREADS", "").isdigit():
        threads = int(env["OMP_NUM_THREADS"])
    if threads is None:
        return share_cores(cores, place, cpu_quota())
    if not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads must be a positive integer, got {threads!r} on local rank {place}")
    return threads


def choose_device(device: torch.device | str | None, local_rank: int) -> torch.device:
    """``device`` if given, else one GPU per local rank where there are GPUs, else the CPU."""
    if device is not None:
        chosen = torch.device(device)
    elif torch.cuda.is_available():
        chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
    else:
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def _talk(deadline: float, shared_memory: bool) -> Talk:
    if deadline <= 0:
        raise ConfigError(f"deadline must be a positive number of seconds, got {deadline!r}")
    return Talk(deadline, shared_memory)


def _one_rank_abort(code: int) -> None:
    os._exit(code)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _hooks(connection: Connection) -> Hooks | None:
    group = connection.group
    if group.size == 1 and _interactive():
        return None
    who = f"[rank {group.rank} of {group.size} on {socket.gethostname()}]"
    return Hooks(who, connection.abort or _one_rank_abort, main=group.size > 1)
