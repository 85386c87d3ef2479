"""Times on a GPU, contender after contender in turn, and the ceilings they are held to."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]

COPY_BYTES = 1 << 30
PRODUCT_SIZE = 8192
FLUSH_BYTES = 1 << 28
"""More than the second-level cache of any GPU so far: written before each timed call, so that memory is read."""


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run: a copy of 1 GiB (read and write counted), a bf16 product of 8192 cubed."""

    bytes_per_s: float
    flops_per_s: float


def interleaved(runs: Mapping[str, Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by contender; A B C A B C ..., after two rounds that do not count.

    On a GPU by events around the call, the cache flushed before; on the CPU by the clock.
    """
    out: dict[str, list[float]] = {name: [] for name in runs}
    timed = _on_gpu if device.type == "cuda" else _on_cpu
    flush = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for turn in range(-2, rounds):
        for name, run in runs.items():
            seconds = timed(run, flush)
            if turn >= 0:
                out[name].append(seconds)
    return out


def _on_gpu(run: Run, flush: torch.Tensor) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    flush.zero_()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _on_cpu(run: Run, flush: torch.Tensor) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ceilings(device: torch.device, rounds: int) -> Ceilings:
    """Measured on a CUDA device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    a, b = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = {name: statistics.median(t) for name, t in interleaved(runs, device, rounds).items()}
    return Ceilings(2 * COPY_BYTES / times["copy"], 2 * PRODUCT_SIZE**3 / times["product"])
