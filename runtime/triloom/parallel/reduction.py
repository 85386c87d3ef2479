"""How a bucket's gradient is summed over dp: exactly, or compressed on the way.

Every rule sums in rank order in the accumulation dtype, so the result does not depend on timing. What is
compressed is the traffic, not the accumulation: each rank's contribution is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from triloom_kernels.table import default

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

    def staging(self, numel: int, ranks: int) -> int:
        """Bytes of its own that it holds from ``post`` to the end of the wait."""
        ...


class Then(Work):
    """Work and what is to be done with its result, once."""

    def __init__(self, work: Work, finish: Callable[[], Any]) -> None:
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

    def staging(self, numel: int, ranks: int) -> int:
        return 0


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

    def staging(self, numel: int, ranks: int) -> int:
        return self.dtype.itemsize * (numel + numel // ranks)


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
        quantise = _KERNELS.pick("quantise", grads.device)
        add_up = _KERNELS.pick("dequantise_sum_", grads.device)
        packed = quantise(grads.view(group.size, -1), self.block)
        received = torch.empty_like(packed)
        return Then(group.all_to_all(received, packed), lambda: add_up(out, received, self.block))

    def volume(self, numel: int, ranks: int) -> float:
        return numel * (1 + 4 / self.block) * (ranks - 1) / ranks

    def staging(self, numel: int, ranks: int) -> int:
        row = numel // ranks * (self.block + 4) // self.block
        return 2 * ranks * (-(-row // 8) * 8)


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
        take, add_up = (_KERNELS.pick(op, grads.device) for op in ("take_largest", "add_taken_"))
        packed, rest = take(grads.view(ranks, n), left.view(ranks, n), self._count(n))
        if bool(rest.isfinite().all()):
            left.copy_(rest.view(-1))
        received = torch.empty_like(packed)
        return Then(group.all_to_all(received, packed), lambda: add_up(out, received))

    def volume(self, numel: int, ranks: int) -> float:
        return 8.0 * self._count(numel // ranks) * (ranks - 1)

    def staging(self, numel: int, ranks: int) -> int:
        return 2 * 8 * self._count(numel // ranks) * ranks


def _put(out: torch.Tensor, values: torch.Tensor) -> None:
    out.copy_(values)


_KERNELS = default()

REDUCTIONS: dict[str, Callable[[], Reduction]] = {
    "exact": Exact,
    "bfloat16": Cast,
    "int8": Quantized,
    "topk": TopK,
}
"""By the name a configuration uses."""
