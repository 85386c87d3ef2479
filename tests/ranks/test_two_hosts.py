"""Two hosts on one machine: namespaces for network, processes, mounts and host name, a virtual cable between them.

Needs root (CAP_NET_ADMIN, CAP_SYS_ADMIN); elsewhere these tests are skipped with what refused. Ranks find each other as
a cluster's do that sets torch's ``env://`` variables; forced host maps (test_groups_shared.py) do the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import launch, processes

HERE = Path(__file__).parent
PROGRAM = str(HERE / "on_hosts.py")
NETWORK = "10.99.77"
UNSHARE = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


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
            call(*UNSHARE, "true")
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


def run(cable: tuple[str, str], hosts: list[str], out: Path) -> dict[str, Any]:
    """Start the ranks (``["0,1", "2"]``: by host) and wait; what rank 0 found."""
    tag = uuid.uuid4().hex
    env = {**os.environ, processes.TAG: tag}
    size = str(sum(len(ranks.split(",")) for ranks in hosts))
    started = []
    try:
        for i, (name, ranks) in enumerate(zip(cable, hosts, strict=True)):
            words = [sys.executable, PROGRAM, "host", f"host{i}", ranks, size, f"{NETWORK}.1", str(out)]
            command = ["ip", "netns", "exec", name, *UNSHARE, *words]
            started.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            )
        texts = [one.communicate(timeout=150)[0] for one in started]
        assert [one.returncode for one in started] == [0, 0], "\n".join(texts)[-6000:]
        assert not processes.wait_gone(tag, 5.0)
    finally:
        processes.kill(tag)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


INSIDE = "messages between hosts, shared memory inside"


def test_hosts_of_two_ranks_and_of_one(cable: tuple[str, str], tmp_path: Path) -> None:
    found = run(cable, ["0,1", "2"], tmp_path / "found.json")
    assert found["launcher"] == "torch-env"
    assert (found["node"], found["names"], found["local"]) == ([0, 0, 1], ["host0", "host1"], [0, 2])
    assert found["transports"] == [INSIDE, "messages"]


@pytest.mark.full
def test_training_over_two_hosts_gives_the_losses_of_one(cable: tuple[str, str], tmp_path: Path) -> None:
    found = run(cable, ["0,2", "1,3"], tmp_path / "found.json")
    assert (found["node"], found["transports"]) == ([0, 1, 0, 1], [INSIDE, "messages"])
    here = tmp_path / "here.json"
    result = launch(4, [sys.executable, str(HERE / "launched.py"), "inside", str(here)])
    assert result.returncode == 0, result.stderr
    assert found["losses"] == json.loads(here.read_text())["losses"]
