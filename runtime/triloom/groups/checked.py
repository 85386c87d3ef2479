"""The argument checks that every Group shares: methods become a Call plus flat tensors.

An implementation provides ``_issue`` (collectives), ``_transfer`` (send and receive) and
``_subgroup``. A call whose own arguments do not fit together is still issued, marked ``refused``, so
that the other ranks raise instead of waiting for ever.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ..errors import GroupError
from .arrays import Array, as_tensor
from .base import DTYPES, REDUCE_OPS, Group, ReduceOp, Work
from .fingerprint import Call
from .objects import agree


class CheckedGroup(Group):
    """Group whose methods check their arguments and hand over to ``_issue`` or ``_transfer``."""

    def all_reduce(self, tensor: Array, op: ReduceOp = "sum") -> Work:
        tensor = as_tensor(tensor)
        refused = _misfit(tensor) or ("" if op in REDUCE_OPS else f"op must be one of {REDUCE_OPS}, got {op!r}")
        return self._issue(Call("all_reduce", tensor.dtype, tensor.numel(), op, -1, refused), tensor, tensor)

    def reduce_scatter(self, output: Array, input: Array, op: ReduceOp = "sum") -> Work:
        output, input = as_tensor(output), as_tensor(input)
        refused = (
            _misfits(output, input)
            or _ratio("input", input, "output", output, self.size)
            or self._not_own_chunk("output", output, "input", input)
            or ("" if op in REDUCE_OPS else f"op must be one of {REDUCE_OPS}, got {op!r}")
        )
        return self._issue(Call("reduce_scatter", input.dtype, input.numel(), op, -1, refused), output, input)

    def all_gather(self, output: Array, input: Array) -> Work:
        output, input = as_tensor(output), as_tensor(input)
        refused = (
            _misfits(output, input)
            or _ratio("output", output, "input", input, self.size)
            or self._not_own_chunk("input", input, "output", output)
        )
        return self._issue(Call("all_gather", input.dtype, input.numel(), "", -1, refused), output, input)

    def broadcast(self, tensor: Array, root: int = 0) -> Work:
        tensor = as_tensor(tensor)
        bad_root = "" if 0 <= root < self.size else f"root must be a rank of the group (0..{self.size - 1}), got {root}"
        call = Call("broadcast", tensor.dtype, tensor.numel(), "", root, _misfit(tensor) or bad_root)
        return self._issue(call, tensor, tensor)

    def all_to_all(self, output: Array, input: Array) -> Work:
        output, input = as_tensor(output), as_tensor(input)
        refused = _misfits(output, input) or _ratio("output", output, "input", input, 1)
        if not refused and input.numel() % self.size:
            refused = f"input of {input.numel()} elements does not divide into {self.size} equal chunks"
        if not refused and _overlap(output, input):
            refused = "output and input overlap; give all_to_all a separate output"
        return self._issue(Call("all_to_all", input.dtype, input.numel(), "", -1, refused), output, input)

    def barrier(self) -> Work:
        return self._issue(Call("barrier"), None, None)

    def send(self, tensor: Array, peer: int) -> Work:
        tensor = as_tensor(tensor)
        return self._transfer(self._transfer_call(tensor, peer), tensor, peer, sending=True)

    def recv(self, tensor: Array, peer: int) -> Work:
        tensor = as_tensor(tensor)
        return self._transfer(self._transfer_call(tensor, peer), tensor, peer, sending=False)

    def split(self, partition: Sequence[Sequence[int]], name: str) -> Group:
        parts = [[int(r) for r in part] for part in partition]
        flat = [r for part in parts for r in part]
        agree(self._talk(), f"split {name!r} of group {self.name!r}", [name, parts])
        if len(set(flat)) != len(flat) or any(not 0 <= r < self.size for r in flat):
            raise GroupError(
                f"split {name!r} of group {self.name!r}: the lists must be disjoint and hold ranks 0..{self.size - 1}, "
                f"got {parts}"
            )
        return self._subgroup(parts, name)

    def _talk(self) -> Group:
        """The group for what the ranks must agree upon, which are host values."""
        return self

    def _not_own_chunk(self, small_name: str, small: torch.Tensor, big_name: str, big: torch.Tensor) -> str:
        own = big.data_ptr() + self.rank * small.numel() * small.element_size()
        if small.data_ptr() == own or not _overlap(small, big):
            return ""
        return f"{small_name} overlaps {big_name} but is not chunk {self.rank} of it"

    def _transfer_call(self, tensor: torch.Tensor, peer: int) -> Call:
        if not 0 <= peer < self.size or peer == self.rank:
            raise GroupError(
                f"rank {self.rank} of group {self.name!r} cannot send to or receive from peer {peer}; "
                f"peers are the other ranks of 0..{self.size - 1}"
            )
        return Call("transfer", tensor.dtype, tensor.numel(), "", -1, _misfit(tensor))

    @abstractmethod
    def _issue(self, call: Call, output: torch.Tensor | None, input: torch.Tensor | None) -> Work:
        """Issue a collective; both tensors are None for a barrier. Raises MismatchError if ``call.refused``."""

    @abstractmethod
    def _transfer(self, call: Call, tensor: torch.Tensor, peer: int, *, sending: bool) -> Work: ...

    @abstractmethod
    def _subgroup(self, parts: Sequence[Sequence[int]], name: str) -> Group:
        """The subgroup of this rank; ``parts`` is agreed upon and valid."""


def _misfit(tensor: torch.Tensor) -> str:
    if tensor.dtype not in DTYPES:
        return f"dtype {tensor.dtype} is not supported; use one of {', '.join(map(str, DTYPES))}"
    if not tensor.is_contiguous():
        return f"tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous"
    return ""


def _misfits(output: torch.Tensor, input: torch.Tensor) -> str:
    if output.dtype != input.dtype or output.device != input.device:
        return f"output ({output.dtype}, {output.device}) and input ({input.dtype}, {input.device}) differ"
    return _misfit(output) or _misfit(input)


def _ratio(big_name: str, big: torch.Tensor, small_name: str, small: torch.Tensor, ratio: int) -> str:
    if big.numel() == ratio * small.numel():
        return ""
    return (
        f"{big_name} has {big.numel()} elements {tuple(big.shape)} but must have {ratio} x {small.numel()} "
        f"= {ratio * small.numel()} ({small_name} is {tuple(small.shape)})"
    )


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel() or not b.numel():
        return False
    a0, b0 = a.data_ptr(), b.data_ptr()
    return a0 < b0 + b.numel() * b.element_size() and b0 < a0 + a.numel() * a.element_size()
