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

Measured = list[tuple[str, dict[str, Any], dict[str, int]]]
"""(kernel, options, resources) of each launch."""


def measure(case: str, arch: int, sizes: Mapping[str, int]) -> Measured:
    """Compile what a case launches. Runs in a worker process."""
    with recording(arch) as recorder:
        CASES[case].run(**sizes)
    return [
        (made.kernel.__name__.strip("_"), made.options, resources(made, arch).__dict__) for made in recorder.launches
    ]
