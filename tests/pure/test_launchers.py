"""Which launcher started a process, by its environment alone: those that cannot be started here too.

The variables of Open MPI 4 and of srun are from their documentation, the others were seen.
"""

from __future__ import annotations

import socket

import pytest
import torch

from triloom import boot, cli
from triloom.connect import Talk, connect_mpi
from triloom.errors import ConfigError, GroupError
from triloom.groups.torch_dist import below, from_store
from triloom.launchers import LAUNCHERS, announced_rank, find_launcher

OPENMPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "2",
    "PMIX_NAMESPACE": "1234567",
    "ORTE_SCHIZO_DETECTION": "ORTE",
}
OPENMPI_5 = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "PMIX_RANK": "2", "PRTE_LAUNCHED": "1"}
MPICH = {"PMI_SIZE": "4", "PMI_RANK": "2", "PMI_FD": "9", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
INTEL = {**MPICH, "I_MPI_HYDRA_UUID": "8c7d0000", "HYDRA_BSTRAP_LAUNCHER": "ssh"}
ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2"}
BATCH = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
STEP = {**ALLOCATION, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
SRUN_PMIX = {**STEP, "PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_SERVER_URI2": "pmix-server"}
SRUN_PMI2 = {**STEP, "PMI_SIZE": "4", "PMI_RANK": "2", "PMI_FD": "3", "PMI_JOBID": "7.0"}
TORCH_ENV = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
TORCHRUN = {**TORCH_ENV, "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.mark.parametrize(
    ("env", "launcher", "size", "rank"),
    [
        ({}, "python", 1, "?"),
        (OPENMPI_4, "openmpi", 4, "2"),
        (OPENMPI_5, "openmpi", 4, "2"),
        (MPICH, "mpich", 4, "2"),
        (INTEL, "intel", 4, "2"),
        ({**MPICH, "I_MPI_ROOT": "/opt/intel/mpi"}, "mpich", 4, "2"),  # a loaded module is not a launcher
        (SRUN_PMIX, "srun-pmix", 4, "2"),
        (SRUN_PMI2, "srun-pmi2", 4, "2"),
        (STEP, "srun", 4, "2"),
        (TORCHRUN, "torchrun", 4, "2"),
        (TORCH_ENV, "torch-env", 4, "2"),
        ({"RANK": "2", "WORLD_SIZE": "4"}, "python", 1, "?"),  # whatever set these, it is not torch's env://
        # one launcher inside another: the inner one counts
        ({**BATCH, **OPENMPI_5}, "openmpi", 4, "2"),
        ({**STEP, **OPENMPI_5}, "openmpi", 4, "2"),
        ({**BATCH, **MPICH}, "mpich", 4, "2"),
        ({**STEP, **INTEL}, "intel", 4, "2"),
        ({**STEP, **TORCHRUN}, "torchrun", 4, "2"),
        # a program that sets torch's variables from MPI's, as DDP code does, still runs under MPI
        ({**OPENMPI_5, **TORCH_ENV}, "openmpi", 4, "2"),
        ({**MPICH, **TORCH_ENV}, "mpich", 4, "2"),
        ({**SRUN_PMIX, **TORCH_ENV}, "srun-pmix", 4, "2"),
    ],
)
def test_found_by_its_variables(env: dict[str, str], launcher: str, size: int, rank: str) -> None:
    row, announced = find_launcher(env)
    assert (row.name, announced, announced_rank(row, env)) == (launcher, size, rank)
    assert boot.announced(env) == boot.Announced(launcher, size, rank)


@pytest.mark.parametrize("env", [ALLOCATION, BATCH])
def test_a_shell_in_an_allocation_was_not_launched_but_trains_nothing_alone(env: dict[str, str]) -> None:
    assert boot.announced(env).size == 1
    with pytest.raises(ConfigError, match=r"SLURM_NTASKS=4.*world of 1 rank.*`srun --mpi=pmix`"):
        boot.init(environ=env, hooks=False)
    assert boot.init(environ=env, launcher="one", hooks=False).size == 1


def test_srun_without_a_pmi_is_refused_with_the_fix() -> None:
    with pytest.raises(ConfigError, match=r"srun started 4 tasks without a PMI.*\(Slurm task 2\).*`srun --mpi=pmix`"):
        boot.init(environ=STEP, hooks=False)
    world = boot.init(environ={**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, hooks=False)
    assert (world.size, world.launcher) == (1, "srun")


@pytest.mark.parametrize("env", [OPENMPI_4, MPICH, INTEL, SRUN_PMIX, SRUN_PMI2])
def test_one_announced_rank_needs_no_mpi(env: dict[str, str]) -> None:
    alone = {name: "1" if name.endswith(("SIZE", "NUM_TASKS")) else value for name, value in env.items()}
    row, announced = find_launcher(alone)
    assert announced == 1
    assert connect_mpi(row, 1, Talk(5.0), alone).group.size == 1


@pytest.mark.parametrize(
    ("env", "arguments", "says"),
    [
        ({**MPICH, "PMI_SIZE": "0"}, {}, "PMI_SIZE='0' must be a number of ranks"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, {}, "WORLD_SIZE='two' must be a number of ranks"),
        ({}, {"launcher": "mpich"}, "launcher='mpich' was asked for, but it did not start this process"),
        (MPICH, {"launcher": "hydra"}, "launcher must be one of 'torchrun', 'openmpi', 'intel', .*got 'hydra'"),
        ({**TORCHRUN, "RANK": "4"}, {}, r"WORLD_SIZE=4 needs RANK \(0\.\.3\).*'RANK': '4'.*torchrun"),
        ({"WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}, {}, "missing: .'RANK', 'MASTER_ADDR', 'MASTER_PORT'."),
        ({}, {"launcher": "one", "comm": object()}, "from one of launcher, comm and group, got launcher and comm"),
        ({}, {"hosts": ["a", "b"]}, r"hosts must name a host for each of the 1 ranks, got \['a', 'b'\]"),
        ({}, {"hosts": "a"}, "hosts must name a host for each of the 1 ranks, got 'a'"),
    ],
)
def test_what_cannot_work_is_refused(env: dict[str, str], arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        boot.init(environ=env, hooks=False, **arguments)  # type: ignore[arg-type]


def test_every_row_says_where_its_rank_is() -> None:
    assert all(row.rank for row in LAUNCHERS if row.transport in ("mpi", "torch", "singletons"))
    assert all(row.other_mpi for row in LAUNCHERS if row.transport == "mpi")


def test_adopting_needs_an_initialised_world() -> None:
    with pytest.raises(ConfigError, match=r"torch.distributed is not initialised.*init_process_group first"):
        boot.adopt(torch.distributed)


def test_a_rank_that_does_not_come_to_the_store_is_named() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("localhost", port, is_master=True, wait_for_workers=False)
    below(store, "here").set("2", "1")
    with pytest.raises(GroupError, match=r"rank 1 of 4: after 0.3 s these ranks had not come to .*: \[0, 3\]"):
        from_store(store, 1, 4, deadline=0.3)


@pytest.mark.parametrize(("rank", "said"), [("0", 1), ("1", 0)])
def test_demo_refuses_to_be_launched_and_says_so_once(
    rank: str, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {**MPICH, "PMI_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["demo"]) == cli.REFUSED
    text = "triloom demo starts its own ranks; run it once, not on the 4 that mpich started"
    assert capsys.readouterr().err.count(text) == said


def test_demo_runs_in_a_shell_of_an_allocation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in BATCH.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["demo", "--dir", "/dev"]) == cli.REFUSED  # it got as far as its folder
    assert "SLURM_NTASKS" not in capsys.readouterr().err
