"""How a bucket's gradient is summed over dp: exactly, or compressed on the way.

Every rule sums in rank order in the accumulation dtype, so the result does not depend on timing. What is
compressed is the traffic, not the accumulation: each rank's contribution is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ConfigError
from ..groups.base import Group, Work


class Reduction(Protocol):
    """Sum ``grads`` ``[ranks * n]`` over the group; this rank's part goes to ``out`` ``[n]``, its view or not.

    ``memory`` is the rule's own, of one bucket, kept from step to step (error feedback); empty at first.
    """

    def post(self, group: Group, out: torch.Tensor, grads: torch.Tensor, memory: dict[str, torch.Tensor]) -> Work: ...

    def volume(self, numel: int, ranks: int) -> float:
        """Bytes a rank sends for a bucket of ``numel`` fp32 elements."""
        ...


class Then(Work):
    """Work and what is to be done with its result, once."""

    def __init__(self, work: Work, finish: Callable[[], None]) -> None:
        self._work: Work | None = work
        self._finish = finish

    def done(self) -> bool:
        return self._work is None or self._work.done()

    def wait(self, deadline: float | None = None) -> None:
        if self._work is not None:
            self._work.wait(deadline)
            self._work = None
            self._finish()


@dataclass(frozen=True)
class Exact:
    """In the accumulation dtype."""

    def post(self, group: Group, out: torch.Tensor, grads: torch.Tensor, memory: dict[str, torch.Tensor]) -> Work:
        return group.reduce_scatter(out, grads)

    def volume(self, numel: int, ranks: int) -> float:
        return 4.0 * numel * (ranks - 1) / ranks


@dataclass(frozen=True)
class Cast:
    """Contributions and sum rounded to a 16-bit dtype (the sum itself is formed in fp32)."""

    dtype: torch.dtype = torch.bfloat16

    def post(self, group: Group, out: torch.Tensor, grads: torch.Tensor, memory: dict[str, torch.Tensor]) -> Work:
        low = out.new_empty(out.numel(), dtype=self.dtype)
        work = group.reduce_scatter(low, grads.to(self.dtype))
        return Then(work, lambda: _put(out, low))

    def volume(self, numel: int, ranks: int) -> float:
        return 2.0 * numel * (ranks - 1) / ranks


@dataclass(frozen=True)
class Quantized:
    """8-bit contributions: blocks of ``block`` elements share their largest magnitude as a scale.

    Linear quantisation to [-127, 127], rounded to nearest even; as in the first all_to_all of ZeRO++'s qgZ
    (arXiv 2306.10209, section 4.3), without its second.
    """

    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 8 or 64 % self.block:
            raise ConfigError(f"block must be 8, 16, 32 or 64 (shards are cut at multiples of 64), got {self.block}")

    def post(self, group: Group, out: torch.Tensor, grads: torch.Tensor, memory: dict[str, torch.Tensor]) -> Work:
        ranks = group.size
        blocks = grads.view(ranks, -1, self.block).float()
        scale = blocks.abs().amax(-1) / 127
        unit = torch.where(scale > 0, scale, torch.ones_like(scale))
        codes = (blocks / unit.unsqueeze(-1)).round().nan_to_num(0, 0, 0).to(torch.int8)
        packed = _pack(codes.view(ranks, -1), scale)
        received = torch.empty_like(packed)

        def finish() -> None:
            total = torch.zeros_like(blocks[0])
            for row in received.view(torch.uint8).view(ranks, -1):
                c, s = _unpack(row, out.numel(), self.block)
                total += c.view(-1, self.block) * s.unsqueeze(-1)
            _put(out, total.view(-1))

        return Then(group.all_to_all(received, packed), finish)

    def volume(self, numel: int, ranks: int) -> float:
        return numel * (1 + 4 / self.block) * (ranks - 1) / ranks


@dataclass(frozen=True)
class TopK:
    """Only the largest ``fraction`` of each part, with error feedback: what is not sent is added next time.

    Lin et al., "Deep Gradient Compression", arXiv 1712.01887 (without its momentum correction). Index and fp32
    value are sent, 8 bytes an element. A gradient that is not finite is sent as it is found, so that the step is
    skipped, and is not remembered; what the other ranks sent in that step is dropped with it.
    """

    fraction: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"the fraction of gradients sent must lie in (0, 1], got {self.fraction}")

    def _count(self, n: int) -> int:
        return min(n, max(1, round(self.fraction * n)))

    def post(self, group: Group, out: torch.Tensor, grads: torch.Tensor, memory: dict[str, torch.Tensor]) -> Work:
        ranks, n = group.size, out.numel()
        left = memory.setdefault("left", torch.zeros_like(grads))
        pending = (left + grads).view(ranks, n)
        indices = pending.abs().topk(self._count(n), dim=1).indices
        values = pending.gather(1, indices)
        sent = values.float()
        if bool(pending.isfinite().all()):
            left.copy_(pending.scatter(1, indices, values - sent.to(values.dtype)).view(-1))
        packed = torch.stack([indices.int(), sent.view(torch.int32)], dim=-1).view(torch.int64).squeeze(-1)
        received = torch.empty_like(packed)

        def finish() -> None:
            total = torch.zeros_like(out)
            for row in received.view(torch.int32).view(ranks, -1, 2):
                total[row[:, 0].long()] += row[:, 1].contiguous().view(torch.float32).to(out.dtype)
            out.copy_(total)

        return Then(group.all_to_all(received, packed), finish)

    def volume(self, numel: int, ranks: int) -> float:
        return 8.0 * self._count(numel // ranks) * (ranks - 1)


def _put(out: torch.Tensor, values: torch.Tensor) -> None:
    out.copy_(values)


def _pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes and scales of each rank's part as int64 words, a dtype every group carries."""
    raw = torch.cat([codes.contiguous().view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=1)
    padding = -raw.shape[1] % 8
    return torch.nn.functional.pad(raw, (0, padding)).contiguous().view(torch.int64)


def _unpack(row: torch.Tensor, n: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = row[n : n + 4 * (n // block)].contiguous().view(torch.float32)
    return row[:n].contiguous().view(torch.int8).float(), scales


REDUCTIONS: dict[str, Callable[[], Reduction]] = {
    "exact": Exact,
    "bfloat16": Cast,
    "int8": Quantized,
    "topk": TopK,
}
"""By the name a configuration uses."""
