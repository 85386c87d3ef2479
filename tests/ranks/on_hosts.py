"""What runs on simulated hosts, inside namespaces of their own (network, processes, mounts, host name).

``on_hosts.py named NAME COMMAND ...`` makes a host of them and becomes the command; ``on_hosts.py ranks 0,1 SIZE
ADDRESS OUT`` starts ranks as a cluster does that sets torch's ``env://`` variables; ``on_hosts.py rank OUT`` is a rank.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

PORT = "29400"


def named(name: str, *command: str) -> int:
    """Give the host its name and a /dev/shm of its own."""
    socket.sethostname(name)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
    os.execvp(command[0], command)


def ranks(numbers: str, size: str, address: str, out: str) -> int:
    """Run this host's ranks; 0 if all of them end well."""
    env = {**os.environ, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": "eth0"}
    command = [sys.executable, __file__, "rank", out]
    started = [subprocess.Popen(command, env={**env, "RANK": number}) for number in numbers.split(",")]
    return max(abs(one.wait()) for one in started)


def rank(out: str) -> int:
    """Collectives over both hosts against the same without shared memory, bit for bit; rank 0 writes what it found."""
    import launched
    import torch

    import group_cases as cases
    import triloom

    world = triloom.init(threads=1, deadline=60)
    flat = triloom.init(threads=1, deadline=60, shared_memory=False)
    for dtype in cases.DTYPES:
        for numel in (40_001, 9000, 5):
            mine = cases.draw(world.rank, dtype, numel * world.size)
            got = []
            for of in (world.group, flat.group):
                x, y, part = mine.clone(), mine.clone(), torch.empty(numel, dtype=dtype)
                whole = torch.empty_like(mine)
                works = [of.all_reduce(x), of.reduce_scatter(part, mine), of.broadcast(y, world.size - 1)]
                works.append(of.all_gather(whole, mine[:numel]))
                for work in reversed(works):
                    work.wait()
                got.append((x, y, part, whole))
            for a, b in zip(*got, strict=True):
                cases.same(a, b)
    found = {
        "launcher": world.launcher, "node": world.topology.node, "names": world.topology.names,
        "local": [world.local_rank, world.local_size],
        "transports": [world.group.transport, flat.group.transport],  # type: ignore[attr-defined]
        "losses": launched.losses(world.group) if world.size in launched.MESHES else [],
    }  # fmt: skip
    flat.close()
    world.close()
    if world.rank == 0:
        Path(out).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit({"named": named, "ranks": ranks, "rank": rank}[sys.argv[1]](*sys.argv[2:]))
