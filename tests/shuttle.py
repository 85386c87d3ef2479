"""A group for host tensors over a device group: the shared cases, written on host tensors, on a GPU's group.

Each operation copies whole storages to the device (so that views keep their place, overlap and
misalignment), runs there, and copies the results back when it is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from triloom.groups.base import Group, ReduceOp, Transfer, Work
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_work import NCCLWork


class Shuttle(Group):
    """``group``'s operations for tensors on the host; what a split gives is wrapped too."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self.name, self.rank, self.size, self.members = group.name, group.rank, group.size, group.members

    def _run(self, call: Any, results: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Work:
        """``call(there)``: ``there`` gives a tensor's counterpart on the device."""
        storages: dict[int, torch.Tensor] = {}
        moved: dict[int, torch.Tensor] = {}
        for t in (*results, *inputs):
            storage = t.untyped_storage()
            if storage.data_ptr() not in storages:
                whole = torch.empty(0, dtype=t.dtype).set_(storage)
                storages[storage.data_ptr()] = whole.to(self.device, copy=True)
            moved[id(t)] = storages[storage.data_ptr()].as_strided(t.size(), t.stride(), t.storage_offset())
        work = call(lambda t: moved[id(t)])
        return ShuttleWork(work, [(t, moved[id(t)]) for t in results])

    def all_reduce(self, tensor: Any, op: ReduceOp = "sum") -> Work:
        return self._run(lambda at: self.group.all_reduce(at(tensor), op), [tensor], [])

    def reduce_scatter(self, output: Any, input: Any, op: ReduceOp = "sum") -> Work:
        return self._run(lambda at: self.group.reduce_scatter(at(output), at(input), op), [output], [input])

    def all_gather(self, output: Any, input: Any) -> Work:
        return self._run(lambda at: self.group.all_gather(at(output), at(input)), [output], [input])

    def broadcast(self, tensor: Any, root: int = 0) -> Work:
        return self._run(lambda at: self.group.broadcast(at(tensor), root), [tensor], [])

    def all_to_all(self, output: Any, input: Any) -> Work:
        return self._run(lambda at: self.group.all_to_all(at(output), at(input)), [output], [input])

    def send(self, tensor: Any, peer: int) -> Work:
        return self._run(lambda at: self.group.send(at(tensor), peer), [], [tensor])

    def recv(self, tensor: Any, peer: int) -> Work:
        return self._run(lambda at: self.group.recv(at(tensor), peer), [tensor], [])

    def batch(self, transfers: Sequence[Transfer]) -> Work:
        tensors: Any = [t.tensor for t in transfers]
        received = [x for t, x in zip(transfers, tensors, strict=True) if t.kind == "recv"]

        def call(at: Any) -> Work:
            return self.group.batch([Transfer(t.kind, at(t.tensor), t.peer) for t in transfers])

        return self._run(call, received, tensors)

    def barrier(self) -> Work:
        return self.group.barrier()

    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        return Shuttle(self.group.split(partition, name), self.device)

    def close(self) -> None:
        self.group.close()


class ShuttleWork(Work):
    def __init__(self, work: Work, results: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._work, self._results = work, results

    def done(self) -> bool:
        return self._work.done()

    def wait(self, deadline: float | None = None) -> None:
        if isinstance(self._work, NCCLWork):
            self._work.synchronize(deadline)  # an error arrives here, not with the next operation
        else:
            self._work.wait(deadline)
        for host, device in self._results:
            host.copy_(device)


def shuttle(group: NCCLGroup) -> Shuttle:
    return Shuttle(group, group.streams.device)
