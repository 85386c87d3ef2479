"""Triton as the operations use it: the language, and how a kernel is launched.

Triton is optional where no kernel runs: without it the op files still import, and their eager references work.
A kernel called then raises :class:`MissingTritonError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # pragma: no cover - depends on what is installed
    from . import without_triton as triton
    from .without_triton import tl

__all__ = ["Launch", "Recorder", "architecture", "launch", "recording", "tl", "triton"]


@dataclass(frozen=True)
class Launch:
    """One launch: enough to compile the kernel for any architecture without a GPU."""

    kernel: Any
    """The ``triton.jit`` function."""
    arguments: tuple[Any, ...]
    """Positional arguments as given; tensors are on the meta device."""
    options: dict[str, Any]
    """Constexprs by name, and num_warps, num_stages and the like."""


@dataclass
class Recorder:
    """Takes the launches of operations called with meta tensors."""

    arch: int
    """Compute capability the launches are for (80, 90, 100): tuned configurations are those of this one."""
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[Recorder | None] = ContextVar("triloom_kernels_recorder", default=None)
_interpreter = Lock()
"""Triton's interpreter replaces parts of ``triton.language`` while a kernel runs: one kernel at a time."""


@contextmanager
def recording(arch: int) -> Iterator[Recorder]:
    """Inside, launches with meta tensors are noted. Only what runs in this context (thread, task) is seen."""
    recorder = Recorder(arch)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def architecture(device: torch.device) -> int:
    """Compute capability times ten; what is recorded for on meta, 0 for the interpreter and where no GPU is."""
    if device.type == "cuda":
        return _capability(device)
    recorder = _recorder.get()
    return recorder.arch if recorder is not None and device.type == "meta" else 0


@cache
def _capability(device: torch.device) -> int:
    if not torch.cuda.is_available():  # estimates run on tensors that only say they are on a GPU
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(
    kernel: Any, grid: tuple[int, ...] | Callable[..., tuple[int, ...]], *arguments: Any, **options: Any
) -> None:
    """``kernel[grid](*arguments, **options)`` on the device of the first tensor among the arguments.

    Multiplications and additions fuse unless ``enable_fp_fusion=False`` (Triton's default differs between versions).
    On tensors without memory (meta, fake) nothing is computed, as everywhere in torch; a :func:`recording` notes what
    is launched on meta. An empty grid launches nothing. Costs about a microsecond beyond Triton's own launch.
    """
    options.setdefault("enable_fp_fusion", True)
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    device = first.device
    if first.untyped_storage().device.type == "meta":
        recorder = _recorder.get()
        if recorder is not None and device.type == "meta":
            recorder.launches.append(Launch(kernel, arguments, options))
        return
    if not callable(grid) and 0 in grid:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    elif device.type == "cuda":
        kernel[grid](*arguments, **options)
    else:
        with _interpreter:
            kernel[grid](*arguments, **options)
