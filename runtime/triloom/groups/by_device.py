"""One group for host and device tensors: each call goes over the transport of its tensor's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .arrays import Array, as_tensor
from .base import Both, Group, ReduceOp, Transfer, Work
from .nccl_group import NCCLGroup


class DeviceGroup(Group):
    """``device`` for tensors on its type of device, ``host`` (the same ranks) for all others.

    A program that sends activations, parameters and gradients over NCCL and counts, losses and objects
    over MPI needs nothing but such a group. Operations of the two are independent of each other;
    ``lanes`` is the device's. ``barrier`` is the host's.
    """

    def __init__(self, host: Group, device: NCCLGroup) -> None:
        self.host, self.device = host, device
        self.name, self.rank, self.size, self.members = device.name, device.rank, device.size, device.members
        self.lanes = device.lanes
        self._type = device.streams.device.type

    @property
    def deadline(self) -> float:
        return self.device.deadline

    @deadline.setter
    def deadline(self, seconds: float) -> None:
        self.host.deadline = self.device.deadline = seconds

    def _over(self, tensor: torch.Tensor) -> Group:
        return self.device if tensor.device.type == self._type else self.host

    def all_reduce(self, tensor: Array, op: ReduceOp = "sum") -> Work:
        tensor = as_tensor(tensor)
        return self._over(tensor).all_reduce(tensor, op)

    def reduce_scatter(self, output: Array, input: Array, op: ReduceOp = "sum") -> Work:
        output, input = as_tensor(output), as_tensor(input)
        return self._over(output).reduce_scatter(output, input, op)

    def all_gather(self, output: Array, input: Array) -> Work:
        output, input = as_tensor(output), as_tensor(input)
        return self._over(output).all_gather(output, input)

    def broadcast(self, tensor: Array, root: int = 0) -> Work:
        tensor = as_tensor(tensor)
        return self._over(tensor).broadcast(tensor, root)

    def all_to_all(self, output: Array, input: Array) -> Work:
        output, input = as_tensor(output), as_tensor(input)
        return self._over(output).all_to_all(output, input)

    def send(self, tensor: Array, peer: int) -> Work:
        tensor = as_tensor(tensor)
        return self._over(tensor).send(tensor, peer)

    def recv(self, tensor: Array, peer: int) -> Work:
        tensor = as_tensor(tensor)
        return self._over(tensor).recv(tensor, peer)

    def batch(self, transfers: Sequence[Transfer]) -> Work:
        tensors = [Transfer(t.kind, as_tensor(t.tensor), t.peer) for t in transfers]
        by_group: dict[int, list[Transfer]] = {0: [], 1: []}
        for t in tensors:
            by_group[int(self._over(as_tensor(t.tensor)) is self.device)].append(t)
        return Both([group.batch(by_group[i]) for i, group in enumerate((self.host, self.device)) if by_group[i]])

    def barrier(self) -> Work:
        return self.host.barrier()

    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        sub = self.device.split(partition, name)
        return DeviceGroup(sub.control, sub) if isinstance(sub, NCCLGroup) else sub

    def warm(self, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        self.device.warm(pairs)

    def check(self) -> None:
        self.device.check()

    def close(self) -> None:
        """Close the device group (and the host groups that its splits made); the host group stays the caller's."""
        self.device.close()
