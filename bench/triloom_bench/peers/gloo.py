"""torch.distributed over gloo in the processes that mpirun started."""

from __future__ import annotations

import os
import socket

import torch.distributed as dist

from triloom.boot import World
from triloom.groups.objects import broadcast_object


def start(world: World) -> None:
    """Initialise the default process group (once) over a free port of this host."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = broadcast_object(world.group, probe.getsockname()[1])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
