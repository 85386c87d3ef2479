"""Setting up NCCL over a host group: one call that every rank makes, then groups for GPU tensors.

::

    world = triloom.init()
    groups = device_world(world.group, world.device)  # the host group itself where there is no GPU
    engine = Engine(..., world=groups, device=world.device)
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch

from .._C import Nccl
from ..errors import ConfigError, GroupError
from ..together import together
from .base import Group
from .by_device import DeviceGroup
from .fingerprint import rank_list
from .nccl import load_nccl, version_text
from .nccl_comm import CommConfig, Communicator
from .nccl_group import NCCLGroup
from .nccl_moves import Sums, choose
from .nccl_streams import CudaStreams, Streams
from .nccl_watchdog import Watchdog
from .objects import agree, broadcast_object, gather_objects


def nccl_group(
    control: Group,
    streams: Streams,
    *,
    name: str = "world",
    library: Nccl | str | None = None,
    config: CommConfig | None = None,
    sums: Sums = "upcast",
    exact: bool = False,
    beat: float = 2.0,
) -> NCCLGroup:
    """A NCCL group over the ranks of a host group; collective over ``control``, which must outlive it.

    streams: this rank's device (``CudaStreams(torch.device("cuda", 0))``). library: loaded, or a path;
    None searches (nccl.py). sums, exact: how floats are summed (nccl_moves.Sums). beat: seconds between
    what the watchdogs tell each other. The deadline is the control group's, for making the group too.

    Raises SetupError on every rank if a rank has no usable library, MismatchError if their versions
    differ, NcclError or DeadlineError if NCCL cannot connect the ranks.
    """
    config = config or CommConfig()
    config.native()
    choose(torch.float32, "sum", control.size, sums, exact)
    found = together(control, lambda: library if isinstance(library, Nccl) else load_nccl(library))
    agree(control, "the version of NCCL", version_text(found.version))
    sharing = _sharing(control, streams)
    unique_id = together(control, lambda: found.unique_id().hex() if control.rank == 0 else "")
    try:
        comm = Communicator.create(
            found,
            bytes.fromhex(broadcast_object(control, unique_id)),
            control.size,
            control.rank,
            what=f"NCCL group {name!r}",
            config=config,
            deadline=control.deadline,
        )
    except GroupError as error:
        if sharing:
            error.add_note(sharing)
        raise
    board = control.split([list(range(control.size))], f"{name}-watchdog") if control.size > 1 else None
    watchdog = Watchdog(board, streams.watching, beat=beat)
    group = NCCLGroup(comm, streams, control, watchdog, name=name, sums=sums, exact=exact)
    watchdog.start()
    return group


def device_world(
    control: Group,
    device: torch.device,
    *,
    library: Nccl | str | None = None,
    config: CommConfig | None = None,
    sums: Sums = "upcast",
    exact: bool = False,
) -> Group:
    """The group to train with on ``device``: ``control`` itself on a CPU or for one rank, else a DeviceGroup.

    Collective over ``control``; arguments as for :func:`nccl_group`. Everything that meshes, engines and
    layers make from it by ``split`` sends GPU tensors over NCCL and host tensors over ``control``.
    Raises ConfigError on every rank unless all ranks are on the same type of device.
    """
    types = gather_objects(control, device.type)
    if len(set(types)) > 1:
        told = ", ".join(f"rank {r}: {t}" for r, t in enumerate(types))
        raise ConfigError(f"all ranks must train on the same type of device, got {told}; pass device=... to init")
    if device.type == "cpu" or control.size == 1:
        return control
    if device.type != "cuda":
        raise ConfigError(
            f"rank {control.rank}: there is no device transport for {device}; use a CUDA device or the CPU"
        )
    streams = CudaStreams(device)
    group = nccl_group(control, streams, name=control.name, library=library, config=config, sums=sums, exact=exact)
    group.warm()
    return DeviceGroup(control, group)


MULTI_RANK = 23000
"""The NCCL that has a switch for several ranks on one GPU."""


def sharing_settings(version: int, rank: int) -> dict[str, str]:
    """Environment variables, set before NCCL's first call, with which ranks may share a GPU: for tests only.

    From 2.30 on there is a switch; before, each rank says that it is on a host of its own, and everything goes through
    the loopback network.
    """
    common = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}
    alone = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if version >= MULTI_RANK else {"NCCL_HOSTID": f"triloom-rank{rank}"}
    return common | alone


def _sharing(control: Group, streams: Streams) -> str:
    """What to do where several ranks are on one device; empty where they are not."""
    places: Sequence[str] = gather_objects(control, f"{socket.gethostname()}/{streams.identity()}")
    twice = [r for r, place in enumerate(places) if places.count(place) > 1]
    if not twice:
        return ""
    return (
        f"{rank_list(twice, control.members)} share a GPU with another rank. Start at most one rank for each GPU; or, "
        "to test only, set NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_MAX_CTAS=2 NCCL_NVLS_ENABLE=0 with NCCL 2.30 or later, "
        "with an earlier one another NCCL_HOSTID for each rank, NCCL_SOCKET_IFNAME=lo and NCCL_IB_DISABLE=1"
    )
