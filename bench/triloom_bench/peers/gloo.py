"""torch.distributed, over gloo unless told otherwise, in the processes that mpirun started."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch.distributed as dist

from triloom.boot import World
from triloom.groups.objects import broadcast_object


def start(world: World, backend: str = "gloo", **options: Any) -> None:
    """Initialise the default process group (once) over a free port of this host."""
    if dist.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = broadcast_object(world.group, probe.getsockname()[1])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=where, rank=world.rank, world_size=world.size, **options)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
