"""AdamW on flat fp32 states, against ``torch.optim.AdamW(fused=True)`` with the same threads.

What it moves: per parameter 4 arrays are read (parameter, gradient, both moments) and 3 written, 28
bytes in fp32; the update is bound by memory, so bandwidth = 28 * parameters / seconds. With a bf16
gradient in and a bf16 copy out (``mixed``) it is 4 * 3 + 2 read and 4 * 3 + 2 written, also 28 bytes,
where separate passes would move 40: widening the gradient 6, the update 28, narrowing the parameter 6.

Set-up: one tensor of ``--params`` elements, buffers touched before timing. The two sides alternate
within one run; reported are the medians of ``--rounds`` and the median of the ratios of the pairs.

Run: ``python -m triloom_bench.adamw [--params 33554432] [--threads 1] [--rounds 15]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from triloom import native

HYPER = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def ours(n: int, threads: int, dtype: torch.dtype) -> Callable[[], None]:
    """One update by the native kernel; a 16-bit ``dtype`` is that of the gradient and of the copy out."""
    param, exp_avg, exp_avg_sq = torch.randn(n), torch.zeros(n), torch.zeros(n)
    grad = torch.randn(n).to(dtype)
    low = None if dtype == torch.float32 else torch.zeros(n, dtype=dtype)
    pool = native.Pool(threads)
    return lambda: native.adamw_(param, grad, exp_avg, exp_avg_sq, step=100, low=low, pool=pool, **HYPER)


def fused(n: int) -> Callable[[], None]:
    """One update by torch's fused optimizer."""
    param = torch.nn.Parameter(torch.randn(n))
    param.grad = torch.randn(n)
    optimizer = torch.optim.AdamW([param], fused=True, **HYPER)
    return lambda: optimizer.step() and None


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=1 << 25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    n = options.params
    sides = {
        "torch fused": fused(n),
        "triloom": ours(n, options.threads, torch.float32),
        "triloom mixed": ours(n, options.threads, torch.bfloat16),
    }
    for run in sides.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, run in sides.items():
            times[name].append(seconds(run))
    print(f"{n} parameters, {options.threads} threads, median of {options.rounds}")
    for name, mine in times.items():
        ratio = statistics.median(t / m for t, m in zip(times["torch fused"], mine, strict=True))
        middle = statistics.median(mine)
        print(f"{name:14} {middle * 1e3:8.2f} ms {28 * n / middle / 1e9:7.2f} GB/s   {ratio:.2f}x torch fused")


if __name__ == "__main__":
    main()
