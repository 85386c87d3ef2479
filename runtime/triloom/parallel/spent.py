"""Where a rank's main thread spent a step, as far as it did not compute gradients: in waits, and in updates."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..groups.base import Work

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "receive": "tensors from other pipeline stages",
        "reduce": "reductions of gradients, of ties too",
        "gather": "parameters that are sharded, or were updated elsewhere",
        "agree": "loss, its weight, and the gradient norm of all ranks",
    }
)
"""What is waited for. Collectives of tensor parallelism inside layers are part of the computes."""


class Spent:
    """Of the step under way, or of the last one. On a GPU: what the host spent.

    Communication is exposed where something waits for it; what overlaps with computes is not seen here.
    """

    def __init__(self) -> None:
        self._ns = dict.fromkeys((*KINDS, "optimizer"), 0)

    def start(self) -> None:
        """A step begins."""
        self._ns = dict.fromkeys(self._ns, 0)

    def wait(self, kind: str, work: Work) -> None:
        """Wait for work that was posted."""
        begin = time.perf_counter_ns()
        work.wait()
        self._ns[kind] += time.perf_counter_ns() - begin

    def add(self, kind: str, begin_ns: int, end_ns: int) -> None:
        self._ns[kind] += end_ns - begin_ns

    def receives(self, also: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
        """What is to be told of waits for receives; ``also`` is told too."""

        def waited(begin_ns: int, end_ns: int) -> None:
            self.add("receive", begin_ns, end_ns)
            if also is not None:
                also(begin_ns, end_ns)

        return waited

    def seconds(self) -> dict[str, float]:
        """By kind; ``exposed`` is the sum of the waits, ``optimizer`` what STEP took."""
        waits = {kind: self._ns[kind] / 1e9 for kind in KINDS}
        return {"exposed": sum(waits.values()), **waits, "optimizer": self._ns["optimizer"] / 1e9}
