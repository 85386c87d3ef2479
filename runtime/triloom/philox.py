"""Counter-based random numbers: every draw is a function of a key and a global element index.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC 2011). Element index ``i`` takes word ``i % 4`` of
``philox(counter=i // 4, key)``. An element's index is ``base + sum(i_k * strides[k])`` over its
position in the tensor, so that a rank that holds a slice names the slice's place in the whole
tensor and draws what one process would draw: no mesh, thread count, memory layout or device changes
a value. Indices are below 2^63.

CPU tensors are filled by the extension; tensors of any other device by the same arithmetic in torch
operations, with the same bits.

- uniform: ``low + (high - low) * w / 2^32``.
- normal: ``mean + std * z`` with z by Box-Muller from words (0, 1) and (2, 3) of a counter; |z| < 6.8.
  Logarithm, sine and cosine are evaluated with + - * / only, in fp64, so that no math library or
  instruction set changes a bit.
- Both are made in fp64 and rounded once to fp32; 16-bit floats are that fp32 value rounded again: a
  bf16 model starts from the rounded weights of the fp32 model.
- dropout: an element is dropped where ``w < p * 2^32``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from triloom_kernels.draws import indices, philox, pieces, words
from triloom_kernels.dropout import drop

from . import _C
from .errors import ConfigError
from .native import DTYPE_CODES, FLOATS, Pool, sqrt, written
from .shadow import shadow
from .shards import ShardSpec

_INDEX_END = 1 << 63


def key(seed: int, *parts: int | str) -> int:
    """A 64-bit key for a purpose, the same on every machine: ``key(seed, "dropout", step, unit)``.

    Different sequences of parts give unrelated keys (BLAKE2b); 1 and "1" are different parts.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in (seed, *parts):
        if not isinstance(part, int | str):
            raise ConfigError(f"a part of a random key must be an int or a str, got {part!r}")
        text = str(int(part)) if isinstance(part, int) else part
        data = text.encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(data)}:".encode() + data)
    return int.from_bytes(digest.digest(), "little")


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Index strides of a whole tensor of this shape, the last dimension consecutive."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def normal_(
    out: torch.Tensor,
    key: int,
    base: int,
    strides: Sequence[int],
    mean: float = 0.0,
    std: float = 1.0,
    *,
    pool: Pool | None = None,
) -> torch.Tensor:
    """Fill with normal draws; ``out`` is any floating-point tensor, contiguous or not. Returns it."""
    if std < 0:
        raise ConfigError(f"normal_: std={std!r} must not be negative")
    return _fill(_C.fill_normal, _normal_values, out, key, base, strides, (mean, std), pool)


def uniform_(
    out: torch.Tensor,
    key: int,
    base: int,
    strides: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    *,
    pool: Pool | None = None,
) -> torch.Tensor:
    """Fill with uniform draws from [low, high), before rounding to the dtype of ``out``. Returns it."""
    if not low <= high:
        raise ConfigError(f"uniform_: low={low!r} must not be above high={high!r}")
    return _fill(_C.fill_uniform, _uniform_values, out, key, base, strides, (low, high), pool)


_Values = Callable[[torch.Tensor, int, float, float], torch.Tensor]


def _fill(
    native: Callable[..., None],
    reference: _Values,
    out: torch.Tensor,
    key: int,
    base: int,
    strides: Sequence[int],
    numbers: tuple[float, float],
    pool: Pool | None,
) -> torch.Tensor:
    _check_box(out, key, base, strides)
    if any(step == 0 and size > 1 for size, step in zip(out.shape, out.stride(), strict=True)):
        raise ConfigError(f"cannot fill an expanded tensor (shape {tuple(out.shape)}, strides {out.stride()})")
    if shadow(out):
        return out
    if out.device.type == "cpu":
        code = DTYPE_CODES[out.dtype]
        native(out.data_ptr(), code, out.shape, out.stride(), tuple(strides), key, base, *numbers, pool)
        written(out)
        return out
    with torch.no_grad():
        for (part,), at in pieces((out,), base, strides):
            part.copy_(_rounded(reference(indices(part, at, strides), key, *numbers), out.dtype))
    return out


def _check_box(tensor: torch.Tensor, key: int, base: int, strides: Sequence[int]) -> None:
    """Raise ConfigError unless every element has an index that can be drawn at."""
    if tensor.dtype not in FLOATS:
        raise ConfigError(f"random draws need a floating-point tensor, got {tensor.dtype}")
    if len(strides) != tensor.dim():
        raise ConfigError(
            f"index strides {tuple(strides)} must have one entry per dimension of shape {tuple(tensor.shape)}"
        )
    if not 0 <= key < 1 << 64:
        raise ConfigError(f"random key {key} is not a 64-bit number; make it with philox.key(seed, ...)")
    if base < 0 or min(strides, default=0) < 0:
        raise ConfigError(f"base {base} and index strides {tuple(strides)} must not be negative")
    last = base + sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
    if last >= _INDEX_END:
        raise ConfigError(f"the last element would draw at index {last}, beyond 2^63 - 1")


Initial = Callable[[torch.Tensor, int, int, Sequence[int], float, Pool | None], object]


def _init_normal(out: torch.Tensor, key: int, base: int, strides: Sequence[int], std: float, pool: Pool | None) -> None:
    normal_(out, key, base, strides, 0.0, std, pool=pool)


def _init_uniform(
    out: torch.Tensor, key: int, base: int, strides: Sequence[int], std: float, pool: Pool | None
) -> None:
    bound = math.sqrt(3.0) * std
    uniform_(out, key, base, strides, -bound, bound, pool=pool)


INITS: Mapping[str, Initial] = {"normal": _init_normal, "uniform": _init_uniform}
"""Ways to fill a parameter, all with mean 0 and the given standard deviation."""


def fill_shard(
    out: torch.Tensor,
    key: int,
    spec: ShardSpec,
    init: str = "normal",
    std: float = 1.0,
    *,
    pool: Pool | None = None,
) -> torch.Tensor:
    """Fill a rank's part of a parameter with the same values that the whole parameter would have there.

    out: the local tensor; ``spec`` says which slices of the global shape it is made of. Indices are
    the row-major positions in the global shape. init: ``normal`` or ``uniform`` (on
    [-sqrt(3) std, sqrt(3) std)), both with mean 0. Returns out.

    Raises ConfigError if the local shape is not the one the spec describes.
    """
    if init not in INITS:
        raise ConfigError(f"init {init!r} is not one of {', '.join(INITS)}")
    shape = list(spec.global_shape)
    if spec.dim is not None:
        shape[spec.dim] = sum(end - start for start, end in spec.slices)
    if list(out.shape) != shape:
        raise ConfigError(f"the shard has shape {tuple(out.shape)}, but {spec} describes {tuple(shape)}")
    strides = row_major(spec.global_shape)
    if spec.dim is None:
        INITS[init](out, key, 0, strides, std, pool)
        return out
    place = 0
    for start, end in spec.slices:
        part = out.detach().narrow(spec.dim, place, end - start)
        INITS[init](part, key, start * strides[spec.dim], strides, std, pool)
        place += end - start
    return out


def dropout(
    x: torch.Tensor, p: float, key: int, base: int, strides: Sequence[int], *, pool: Pool | None = None
) -> torch.Tensor:
    """Zero elements with probability p and scale the others by 1 / (1 - p).

    x: floating-point, any strides. Which elements fall depends only on ``key`` and their global
    indices; nothing but these is kept for the backward pass. Differentiable any number of times.

    Raises ConfigError unless 0 <= p < 1.
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout probability must be in [0, 1), got {p!r}")
    if p == 0.0:
        return x
    _check_box(x, key, base, strides)
    out: torch.Tensor = _Dropout.apply(x, int(p * 2**32), 1.0 / (1.0 - p), key, base, tuple(strides), pool)  # type: ignore[no-untyped-call]
    return out


class _Dropout(torch.autograd.Function):
    """Linear in x, so that its backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *how: Any) -> torch.Tensor:
        ctx.how = how
        return _drop(x, *how)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return (_Dropout.apply(grads[0], *ctx.how), *(None for _ in ctx.how))  # type: ignore[no-untyped-call]


def _drop(
    x: torch.Tensor,
    threshold: int,
    scale: float,
    key: int,
    base: int,
    strides: tuple[int, ...],
    pool: Pool | None,
) -> torch.Tensor:
    if shadow(x):
        return torch.empty_like(x)
    if x.device.type == "cpu":
        out, code = torch.empty_like(x), DTYPE_CODES[x.dtype]
        _C.dropout(
            out.data_ptr(),
            x.data_ptr(),
            code,
            x.shape,
            out.stride(),
            x.stride(),
            strides,
            key,
            base,
            threshold,
            scale,
            pool,
        )
        return out
    return drop(x, threshold, scale, key, base, strides)


# The torch reference: the arithmetic of csrc/philox_kernels.cpp, operation by operation. Each torch
# operation below rounds once; none may be fused with another or replaced by a library function. The words and
# dropout are those of triloom_kernels.


def _uniform_values(index: torch.Tensor, key: int, low: float, high: float) -> torch.Tensor:
    return (words(index, key).double() * 2.0**-32) * (high - low) + low


def _normal_values(index: torch.Tensor, key: int, mean: float, std: float) -> torch.Tensor:
    quad = philox(index >> 2, key)
    second = (index & 2) != 0
    radius = sqrt(_log_of_word(torch.where(second, quad[2], quad[0])) * -2.0)
    cosine, sine = _on_circle(torch.where(second, quad[3], quad[1]))
    z = radius * torch.where((index & 1) != 0, sine, cosine)
    return z * std + mean


def _log_of_word(w: torch.Tensor) -> torch.Tensor:
    """ln((w + 1/2) / 2^32), as 2 artanh(s) with s = (m - 1) / (m + 1) for the mantissa m near 1."""
    half, exponent = torch.frexp((w.double() + 0.5) * 2.0**-32)
    low = half < 0.70710678118654752440
    m = torch.where(low, half * 2.0, half)
    e = exponent.double() - low.double()
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(z, 1.0 / 23)
    for n in range(21, 1, -2):
        p = p * z + 1.0 / n
    twice = s + s
    return e * 0.69314718055994530942 + (twice + twice * z * p)


_COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(9, -1, -1))
_SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(9, 0, -1))


def _horner(z: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    p = torch.full_like(z, coefficients[0])
    for c in coefficients[1:]:
        p = p * z + c
    return p


def _on_circle(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of 2 pi w / 2^32: quarter turns in integers, the rest by Taylor series."""
    quarter = (w + 0x20000000) >> 30  # 4 is the same as 0 below
    x = (w - (quarter << 30)).double() * (6.28318530717958647693 * 2.0**-32)
    z = x * x
    c = _horner(z, _COSINE)
    s = x + x * z * _horner(z, _SINE)
    swap = (quarter & 1) != 0
    a, b = torch.where(swap, s, c), torch.where(swap, c, s)
    return torch.where(((quarter + 1) & 2) != 0, -a, a), torch.where((quarter & 2) != 0, -b, b)


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp64 values in another dtype; 16-bit floats by way of fp32."""
    return values if dtype == torch.float64 else values.float().to(dtype)
