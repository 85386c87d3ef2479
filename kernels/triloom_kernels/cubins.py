"""Recorded launches compiled to cubins, and what a cubin needs: proof without a GPU that a kernel builds and fits::

with recording(90) as recorder:
    rms_norm(torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16), ...)
resources(recorder.launches[0], 90)
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launching import Launch, triton

ARCHITECTURES = (80, 90, 100)

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture, as cuobjdump prints them."""

    registers: int
    """Of a thread; 255 at most."""
    stack: int
    """Bytes of a thread in local memory: spills."""
    shared: int
    """Bytes of a block, static and dynamic."""


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compiled as a launch on a GPU would: pointers and sizes divisible by 16 are told, ones are folded."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, parameters = launch.kernel.arg_names, launch.kernel.params
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        signature[name], divisible = _type_of(value, special=not parameters[place].do_not_specialize)
        if signature[name] == "constexpr":
            constants[name] = value
        if divisible:
            attributes[place,] = [["tt.divisibility", 16]]
    options = dict(launch.options)
    for name in names:
        if name in options:
            signature[name], constants[name] = "constexpr", options.pop(name)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def _type_of(value: Any, *, special: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is told to be divisible by 16. special: its value may be told."""
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype], True
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1 and special:
            return "constexpr", False
        return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and special
    return ("constexpr" if value is None else "fp32"), False


def resources(launch: Launch, arch: int) -> Resources:
    """Compile for ``arch`` and read the cubin with the cuobjdump that Triton brings."""
    compiled = compile_launch(launch, arch)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", told))
    return Resources(int(found["REG"]), int(found["STACK"]), max(int(found["SHARED"]), compiled.metadata.shared))
