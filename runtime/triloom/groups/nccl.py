"""The NCCL library of this machine: where it is found, what its codes are, and memory of its own.

Nothing is linked and nothing bundled: the first library found is loaded at run time, in this order:
the path that was given, the one this process has loaded already (torch with CUDA loads it), the
``nvidia-nccl-cu12`` or ``-cu13`` wheels on ``sys.path``, and what the system's loader finds. NCCL 2.18
is enough for a Group; memory and buffer registration need 2.19, windows 2.27: a function that the
library lacks raises NcclError naming the version that brought it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _C
from .._C import Nccl, NcclError
from ..errors import GroupError
from .base import ReduceOp

SONAME = "libnccl.so.2"
MINIMUM = 21800
"""Split of communicators, and the layout of the configuration."""

DTYPE_CODES: Mapping[torch.dtype, int] = {
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
REDUCE_CODES: Mapping[ReduceOp, int] = {"sum": 0, "max": 2, "min": 3}

INSTALL = (
    "pip install nvidia-nccl-cu12 (or -cu13, as torch.version.cuda says), name the library (library=...), "
    "or pass the host group itself, which stages GPU tensors through pinned memory"
)


class Place(NamedTuple):
    """One place to look: a path or soname, and whether only an already loaded library counts."""

    what: str
    path: str
    loaded_only: bool = False


def wheel_paths(folders: Sequence[str]) -> Iterator[str]:
    """NCCL as its wheels install it, below the folders of ``sys.path``."""
    for folder in folders:
        path = Path(folder or ".", "nvidia", "nccl", "lib", SONAME)
        if path.is_file():
            yield str(path)


def places(path: str | None = None, folders: Sequence[str] | None = None) -> list[Place]:
    """Where to look, in order. A path that was given is the only place: it is never replaced by another."""
    if path is not None:
        return [Place("given", path)]
    wheels = wheel_paths(sys.path if folders is None else folders)
    return [
        Place("already loaded", SONAME, loaded_only=True),
        *(Place("wheel", wheel) for wheel in wheels),
        Place("loader", SONAME),
    ]


def load_nccl(
    path: str | None = None,
    *,
    search: Sequence[Place] | None = None,
    load: Callable[[str, bool], Nccl] = _C.Nccl,
) -> Nccl:
    """The first library found; raises NcclError naming every place if there is none, or if it is too old."""
    tried = []
    for place in places(path) if search is None else search:
        try:
            library = load(place.path, place.loaded_only)
        except NcclError as error:
            tried.append(f"{place.what}: {error}")
            continue
        if library.version < MINIMUM:
            raise NcclError(
                f"{library.path} is NCCL {version_text(library.version)}, triloom needs {version_text(MINIMUM)} or "
                f"later; {INSTALL}"
            )
        return library
    raise NcclError(f"no NCCL library was found ({'; '.join(tried)}); {INSTALL}")


def version_text(code: int) -> str:
    """``2.28.9`` for 22809 (the coding of NCCL 2.9 and later)."""
    return f"{code // 10000}.{code % 10000 // 100}.{code % 100}"


class NcclMemory:
    """Device memory that NCCL allocated, fit for registration and windows; needs NCCL 2.19.

    ``tensor`` views it; freed by ``free``, or when the object goes. Never before the communicators
    on which it was registered have closed.
    """

    def __init__(self, library: Nccl, nbytes: int) -> None:
        if nbytes <= 0:
            raise GroupError(f"NcclMemory needs a positive number of bytes, got {nbytes}")
        self._library = library
        self.nbytes = nbytes
        self.address = library.mem_alloc(nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3, "strides": None}

    def tensor(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor over the first bytes, on the device that was current at allocation."""
        flat = torch.as_tensor(self, device="cuda")
        numel = torch.Size(shape).numel()
        if numel * dtype.itemsize > self.nbytes:
            raise GroupError(f"a {dtype} tensor of shape {tuple(shape)} does not fit into {self.nbytes} bytes")
        return flat[: numel * dtype.itemsize].view(dtype).view(tuple(shape))

    def free(self) -> None:
        if self.address:
            address, self.address = self.address, 0
            self._library.mem_free(address)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.free()
