"""Who started this process: launchers by the environment variables they leave. Pure; boot passes the environment in.

What each row relies on was seen with Open MPI 5, MPICH 5, Intel MPI 2021 and torchrun; for Open MPI 4 and for
Slurm's srun it is what their documentation says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

Env = Mapping[str, str]
Transport = Literal["mpi", "torch", "one", "singletons", "python"]
"""How the ranks reach each other: a row of ``connect.CONNECT``."""


@dataclass(frozen=True)
class Launcher:
    """One way a job is started."""

    name: str
    announced: Callable[[Env], int | None]
    """World size the launcher put into the environment; None if it did not start this process."""
    transport: Transport
    rank: tuple[str, ...] = ()
    """Variables that may hold the rank, for messages before the ranks are connected."""
    other_mpi: str = ""
    """What to do when this launcher's ranks do not find each other through mpi4py's MPI."""


def variable(name: str, *, beside: tuple[str, ...] = ()) -> Callable[[Env], int | None]:
    """Reads a world size from a variable, where all of ``beside`` are set too."""

    def announced(env: Env) -> int | None:
        text = env.get(name)
        if text is None or any(other not in env for other in beside):
            return None
        if not text.isdigit() or int(text) < 1:
            raise ConfigError(f"{name}={text!r} must be a number of ranks; unset it if no launcher set it")
        return int(text)

    return announced


def one(env: Env) -> int:
    return 1


WHEEL = "use the mpirun of the MPI that mpi4py loads (`python -m mpi4py --mpi-lib-version` names it)"
PMI2 = (
    "Slurm offered PMI2, which this MPI does not speak: `srun --mpi=pmix` for Open MPI; for MPICH and Intel MPI "
    "`srun --mpi=pmi2`, Intel MPI with I_MPI_PMI_LIBRARY naming Slurm's libpmi2.so"
)
PMIX = (
    "Slurm offered PMIx, which this MPI does not speak: `srun --mpi=pmi2` for MPICH and Intel MPI (Intel MPI with "
    "I_MPI_PMI_LIBRARY naming Slurm's libpmi2.so), or mpirun inside the allocation"
)

LAUNCHERS: tuple[Launcher, ...] = (
    Launcher("torchrun", variable("WORLD_SIZE", beside=("TORCHELASTIC_RUN_ID",)), "torch", ("RANK",)),
    Launcher("openmpi", variable("OMPI_COMM_WORLD_SIZE"), "mpi", ("OMPI_COMM_WORLD_RANK",), WHEEL),
    Launcher("intel", variable("PMI_SIZE", beside=("I_MPI_HYDRA_UUID",)), "mpi", ("PMI_RANK",), WHEEL),
    Launcher(
        "srun-pmi2", variable("PMI_SIZE", beside=("SLURM_STEP_NUM_TASKS", "PMI_JOBID")), "mpi", ("PMI_RANK",), PMI2
    ),
    Launcher("mpich", variable("PMI_SIZE"), "mpi", ("PMI_RANK",), WHEEL),
    Launcher("srun-pmix", variable("SLURM_STEP_NUM_TASKS", beside=("PMIX_RANK",)), "mpi", ("SLURM_PROCID",), PMIX),
    Launcher("srun", variable("SLURM_STEP_NUM_TASKS"), "singletons", ("SLURM_PROCID",)),
    Launcher("torch-env", variable("WORLD_SIZE", beside=("RANK", "MASTER_ADDR", "MASTER_PORT")), "torch", ("RANK",)),
    Launcher("python", one, "python"),
    Launcher("one", one, "one"),
)
"""The first row that announces a size is taken: the innermost launcher where one starts another (mpirun inside
srun, torchrun inside either). "one" is reached by name only.

openmpi: versions 4 and 5 set the same. srun-pmi2, srun-pmix, srun: ``srun --mpi=pmi2``, ``--mpi=pmix``, ``--mpi=none``.
torch-env: torch's ``env://`` variables without torchrun, as Kubernetes' PyTorchJob sets them.
"""


def find_launcher(env: Env, name: str | None = None) -> tuple[Launcher, int]:
    """The launcher of this process, or the one named, and the world size it announced. Raises ConfigError."""
    for launcher in LAUNCHERS:
        if name not in (None, launcher.name):
            continue
        size = launcher.announced(env)
        if size is not None:
            return launcher, size
        if name is not None:
            raise ConfigError(f"launcher={name!r} was asked for, but it did not start this process")
    names = ", ".join(repr(launcher.name) for launcher in LAUNCHERS)
    raise ConfigError(f"launcher must be one of {names}, got {name!r}")


def announced_rank(launcher: Launcher, env: Env) -> str:
    """What the launcher says is this process's rank, or a question mark."""
    return next((env[name] for name in launcher.rank if name in env), "?")
