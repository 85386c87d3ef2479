"""Two hosts on one machine: namespaces for network, processes, mounts and host name, a virtual cable between them.

Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN); elsewhere these tests are skipped with what refused. More shapes of hosts are
tested by forced host maps (test_groups_shared.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness import launch, processes
from harness.launcher import mpirun

HERE = Path(__file__).parent
PROGRAM = str(HERE / "on_hosts.py")
NETWORK = "10.99.77"
UNSHARE = ["unshare", "--uts", "--mount"]
PROCESSES = ["--pid", "--fork", "--kill-child", "--mount-proc"]


def call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cable() -> Iterator[tuple[str, str]]:
    """Two network namespaces with an ``eth0`` each, joined; their names."""
    names = tuple(f"triloom-{uuid.uuid4().hex[:8]}" for _ in range(2))
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("two hosts are simulated with ip (iproute2) and unshare (util-linux), which are not installed")
    try:
        try:
            call(*UNSHARE, *PROCESSES, "true")
            for name in names:
                call("ip", "netns", "add", name)
            ends = ["eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1]]
            call("ip", "link", "add", *ends)
            for i, name in enumerate(names, 1):
                call("ip", "-n", name, "addr", "add", f"{NETWORK}.{i}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    call("ip", "-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no namespaces ({' '.join(error.cmd[:4])}: {error.stderr.strip()})")
        yield names  # type: ignore[misc]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@contextmanager
def launches(out: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start(options of unshare, namespace, host name, command ...)``; nothing of what was started is left."""
    tag = uuid.uuid4().hex
    env = {**os.environ, processes.TAG: tag, "TMPDIR": str(out.parent)}

    def start(apart: list[str], space: str, name: str, *command: str) -> subprocess.Popen[str]:
        words = ["ip", "netns", "exec", space, *UNSHARE, *apart, sys.executable, PROGRAM, "named", name, *command]
        return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    try:
        yield start
    finally:
        processes.kill(tag)


def over_torch(cable: tuple[str, str], hosts: list[str], out: Path) -> dict[str, Any]:
    """Ranks (``["0,1", "2"]``: by host) that find each other through torch's variables; what rank 0 found."""
    size = str(sum(len(ranks.split(",")) for ranks in hosts))
    with launches(out) as start:
        started = [
            start(PROCESSES, space, f"host{i}", sys.executable, PROGRAM, "ranks", ranks, size, f"{NETWORK}.1", str(out))
            for i, (space, ranks) in enumerate(zip(cable, hosts, strict=True))
        ]
        texts = [one.communicate(timeout=150)[0] for one in started]
        assert [one.returncode for one in started] == [0, 0], "\n".join(texts)[-6000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def over_mpi(cable: tuple[str, str], hosts: list[int], out: Path) -> dict[str, Any]:
    """So many ranks on each host, from an mpirun on the first, which enters the second where it would use ssh.

    It must see the second's processes for that: the first has no process namespace of its own.
    """
    with launches(out) as start:
        second = start(PROCESSES, cable[1], "host1", "sleep", "300")
        children = Path(f"/proc/{second.pid}/task/{second.pid}/children")
        until = time.monotonic() + 20
        while "sleep" not in (inside := [name(int(pid)) for pid in children.read_text().split()]):
            assert time.monotonic() < until, inside
            time.sleep(0.02)
        agent = out.with_name("agent.sh")
        entering = f"nsenter --target {children.read_text().split()[0]} --net --uts --mount --pid"
        agent.write_text(f'#!/bin/sh\nshift\nexec {entering} sh -c "$*"\n')
        agent.chmod(0o755)
        where = ",".join(f"{NETWORK}.{i}:{n}" for i, n in enumerate(hosts, 1))
        options = ["--host", where, "--map-by", "slot", "--bind-to", "none", "-n", str(sum(hosts))]
        options += ["--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", "eth0"]
        options += ["--mca", "btl_tcp_if_include", "eth0"]
        job = start([], cable[0], "host0", mpirun(), *options, sys.executable, PROGRAM, "rank", str(out))
        text, _ = job.communicate(timeout=150)
        assert job.returncode == 0, text[-6000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


INSIDE = "messages between hosts, shared memory inside"


def test_mpirun_over_hosts_of_two_ranks_and_of_one(cable: tuple[str, str], tmp_path: Path) -> None:
    found = over_mpi(cable, [2, 1], tmp_path / "found.json")
    assert found["launcher"] == "openmpi"
    assert (found["node"], found["names"], found["local"]) == ([0, 0, 1], ["host0", "host1"], [0, 2])
    assert found["transports"] == [INSIDE, "messages"]


@pytest.mark.full
def test_torch_over_hosts_of_two_ranks_and_of_one(cable: tuple[str, str], tmp_path: Path) -> None:
    found = over_torch(cable, ["0,1", "2"], tmp_path / "found.json")
    assert (found["launcher"], found["node"], found["transports"]) == ("torch-env", [0, 0, 1], [INSIDE, "messages"])


@pytest.mark.full
def test_training_over_two_hosts_gives_the_losses_of_one(cable: tuple[str, str], tmp_path: Path) -> None:
    mpi = over_mpi(cable, [2, 2], tmp_path / "mpi.json")
    torch = over_torch(cable, ["0,2", "1,3"], tmp_path / "torch.json")
    assert (mpi["node"], torch["node"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    here = tmp_path / "here.json"
    result = launch(4, [sys.executable, str(HERE / "launched.py"), "inside", str(here)])
    assert result.returncode == 0, result.stderr
    assert mpi["losses"] == torch["losses"] == json.loads(here.read_text())["losses"]
