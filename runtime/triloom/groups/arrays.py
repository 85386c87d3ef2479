"""Arrays of other libraries as tensors that share their memory, and back.

Every Group call takes a torch.Tensor or any array that speaks DLPack (NumPy, CuPy, JAX, ...) or
``__cuda_array_interface__`` (Numba, older CuPy). Nothing is copied: what an operation writes is in
the array when the operation is over.

On a GPU an operation is ordered with torch's current stream. DLPack makes torch's stream wait for the
array's producer; what reads the result must run on torch's stream, or wait for it (for CuPy: inside
``with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)``).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch.utils.dlpack import from_dlpack

from ..errors import ConfigError


class DLPackArray(Protocol):
    """An array with the DLPack protocol."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


class CudaArray(Protocol):
    """An array with the CUDA array interface."""

    @property
    def __cuda_array_interface__(self) -> Any: ...


Array: TypeAlias = torch.Tensor | DLPackArray | CudaArray
"""What Group calls take."""

A = TypeVar("A")


def as_tensor(array: Array) -> torch.Tensor:
    """A tensor over the same memory; a tensor is returned as it is.

    Raises ConfigError for anything that is no array, that must not be written, or whose memory
    cannot be shared (a dtype or strides that torch does not know).
    """
    if isinstance(array, torch.Tensor):
        return array
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    # In the first interface that an array has: DLPack also orders the streams.
    share = next((share for name, share in _SHARED.items() if hasattr(array, name)), None)
    if share is None:
        raise ConfigError(
            f"a {kind} is no array: pass a torch.Tensor, or an array with __dlpack__ or __cuda_array_interface__"
        )
    if _read_only(array):
        raise ConfigError(f"the {kind} is read-only, and an operation may write to it; pass a writable array")
    try:
        return share(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"the {kind} cannot share its memory with torch: {error}") from error


def from_tensor(tensor: torch.Tensor, like: A) -> A:
    """``tensor`` as an array of the library of ``like``, over the same memory: the way back.

    Raises ConfigError if that library cannot take one (``array_namespace.from_dlpack`` of the array API).
    """
    if isinstance(like, torch.Tensor):
        return tensor  # type: ignore[return-value]
    namespace = getattr(like, "__array_namespace__", None)
    take = getattr(namespace(), "from_dlpack", None) if callable(namespace) else None
    if take is None:
        raise ConfigError(f"{type(like).__module__} offers no from_dlpack (array API); convert the tensor by hand")
    made: A = take(tensor)
    return made


def _from_dlpack(array: Any) -> torch.Tensor:
    return from_dlpack(array)


def _from_cuda(array: Any) -> torch.Tensor:
    return torch.as_tensor(array, device="cuda")


_SHARED = {"__dlpack__": _from_dlpack, "__cuda_array_interface__": _from_cuda}


def _read_only(array: Any) -> bool:
    """As far as the array says; DLPack before version 1 cannot."""
    for name in ("__array_interface__", "__cuda_array_interface__"):
        told = getattr(array, name, None)
        if isinstance(told, dict) and told.get("data") is not None:
            return bool(told["data"][1])
    return False
