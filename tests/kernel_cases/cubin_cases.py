"""All operations on meta tensors, by name: each module here has its own in ``CUBINS``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triloom_kernels.cubins import resources
from triloom_kernels.launching import recording

from . import activations, attention, dropouts, flats, losses, norms, ropes
from .common import CubinCase

MODULES = (activations, attention, dropouts, flats, losses, norms, ropes)
CASES: Mapping[str, CubinCase] = {name: case for module in MODULES for name, case in module.CUBINS.items()}

BEYOND = 4
"""An entry without a bound is compiled for sizes this many times the bounds of the entry before it."""

MAY_SPILL = frozenset(
    {
        "attention_dkdv_kernel",  # two accumulators and two score tiles: a few loop invariants go to local memory
        "attention_dq_kernel",  # true fp32 products keep whole rows in registers
        "attention_forward_kernel",  # the same
    }
)
"""Kernels that may use local memory, each with a reason beside it; the budget says how much."""

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes a block can have (CUDA programming guide, table of compute capabilities)."""

Measured = list[tuple[str, dict[str, Any], dict[str, int]]]
"""(kernel, options, resources) of each launch."""


def measure(case: str, arch: int, sizes: Mapping[str, int]) -> Measured:
    """Compile what a case launches. Runs in a worker process."""
    with recording(arch) as recorder:
        CASES[case].run(**sizes)
    return [
        (made.kernel.__name__.strip("_"), made.options, resources(made, arch).__dict__) for made in recorder.launches
    ]


def check(found: Measured, arch: int) -> None:
    """What holds for every kernel, tuned or not."""
    assert found, "the case launches nothing"
    for kernel, options, used in found:
        told = f"{kernel} on sm_{arch} with {options}: {used}"
        assert used["stack"] == 0 or kernel in MAY_SPILL, f"spills: {told}"
        assert used["shared"] <= SHARED_LIMIT[arch], f"does not fit shared memory: {told}"
        assert used["registers"] * 32 * options.get("num_warps", 4) <= 65536, f"does not fit the registers: {told}"
