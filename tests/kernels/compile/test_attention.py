"""What attention compiles to: products on tensor cores, and every option fits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernel_cases.common import backward, meta
from triloom_kernels.attention import Packed
from triloom_kernels.attention.flash import flash_attention, flash_attention_with_lse
from triloom_kernels.cubins import compile_launch, resources
from triloom_kernels.launching import Launch, recording

PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""Of 16-bit matrices, in PTX."""


def inputs(width: int) -> tuple[Tensor, Tensor, Tensor]:
    q = meta(1, 4096, 32, width).transpose(1, 2)
    k, v = (meta(1, 4096, 8, width).transpose(1, 2) for _ in range(2))
    return q, k, v


def by_name(launches: list[Launch]) -> dict[str, Launch]:
    return {launch.kernel.__name__: launch for launch in launches}


@pytest.mark.parametrize("arch", PRODUCTS)
def test_products_run_on_tensor_cores(arch: int) -> None:
    with recording(arch) as recorder:
        backward(flash_attention(*inputs(128)))
    launches = by_name(recorder.launches)
    # Two products, four and three, each in a loop for the inside and one for the edges.
    for kernel in ("attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"):
        assert PRODUCTS[arch] in compile_launch(launches[kernel], arch).asm["ptx"], kernel


@pytest.mark.full
@pytest.mark.parametrize("arch", PRODUCTS)
@pytest.mark.parametrize("width", [64, 96, 128, 256])
def test_every_option_fits(width: int, arch: int) -> None:
    """Full, windowed, packed, with logs: what none of the tuned cases compiles."""
    starts = torch.empty(9, dtype=torch.int32, device="meta")
    with recording(arch) as recorder:
        for causal in (False, True):
            backward(flash_attention(*inputs(width), causal=causal, window=300))
            backward(*flash_attention_with_lse(*inputs(width), causal=causal, packed=Packed.of(starts, 1000)))
    for launch in recorder.launches:
        used = resources(launch, arch)
        assert used.shared <= {80: 163, 90: 227, 100: 227}[arch] * 1024, (launch.kernel.__name__, launch.options, used)
        assert used.registers * 32 * launch.options["num_warps"] <= 65536
        assert used.stack <= 1024, (launch.kernel.__name__, launch.options, used)
