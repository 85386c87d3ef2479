"""Rounding of fp32 to bf16 by chance, so that what is too small to move a parameter moves it now and then.

A value between two bf16 neighbours becomes the upper one with the probability of its distance from the lower one, so
its expectation is exact (Gupta et al., "Deep Learning with Limited Numerical Precision", arXiv 1502.02551, section 3).
The draws are those of :mod:`.philox`: a function of a key and of the element's place in the whole tensor, so that
no shard, mesh, thread count or device changes a bit. The low 16 bits of an element's word are added to the 16 bits
that bf16 has not, and what is left of them is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from triloom_kernels.draws import indices, pieces, words

from . import _C
from .errors import ConfigError
from .native import Pool, written
from .philox import _check_box
from .shards import ShardSpec

_LOW = 0xFFFF


def round_stochastic_(
    out: torch.Tensor,
    values: torch.Tensor,
    key: int,
    base: int,
    strides: Sequence[int],
    *,
    pool: Pool | None = None,
) -> torch.Tensor:
    """``out`` (bf16) = ``values`` (fp32) of the same shape, rounded by chance, of any strides both. Returns out.

    Element ``(i0, i1, ...)`` draws at ``base + sum(i_k * strides[k])``. What is not finite stays what it is.
    """
    if (out.dtype, values.dtype) != (torch.bfloat16, torch.float32) or out.shape != values.shape:
        raise ConfigError(
            f"stochastic rounding is from float32 to bfloat16 of one shape, got {values.dtype} {tuple(values.shape)} "
            f"and {out.dtype} {tuple(out.shape)}"
        )
    _check_box(values, key, base, strides)
    if out.device.type == "cpu":
        _C.round_stochastic(
            out.data_ptr(), values.data_ptr(), out.shape, out.stride(), values.stride(), tuple(strides), key, base, pool
        )
        written(out)
        return out
    with torch.no_grad():
        for (part, source), at in pieces((out, values), base, strides):
            part.copy_(_rounded(source, words(indices(source, at, strides), key)))
    return out


def _rounded(values: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The same in torch operations, for any device."""
    bits = values.contiguous().view(torch.int32)
    cut = (bits + (drawn & _LOW).int()).bitwise_and_(~_LOW).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).bfloat16()


class Box(NamedTuple):
    """Part of a flat piece whose elements lie evenly in the whole tensor."""

    start: int
    """First element, counted in the piece."""
    shape: tuple[int, ...]
    local: tuple[int, ...]
    """Strides in the piece."""
    base: int
    """Of the first element in the whole tensor."""
    whole: tuple[int, ...]
    """Strides there."""


def boxes(spec: ShardSpec, first: int, count: int) -> Iterator[Box]:
    """Where elements ``first`` to ``first + count`` of a rank's flat local tensor lie in the whole one, row-major."""
    if spec.dim is None:
        yield Box(0, (count,), (1,), first, (1,))
        return
    inner = math.prod(spec.global_shape[spec.dim + 1 :])
    row, whole_row = sum(b - a for a, b in spec.slices) * inner, spec.global_shape[spec.dim] * inner
    if not row:
        return
    at = 0
    for a, b in spec.slices:
        width = (b - a) * inner
        yield from _columns(first, count, row, whole_row, at, width, a * inner)
        at += width


def _columns(first: int, count: int, row: int, whole_row: int, at: int, width: int, whole_at: int) -> Iterator[Box]:
    """Of local columns ``at`` to ``at + width``, which begin at ``whole_at`` in the whole: the part of a first row, all
    of the rows in between, the part of a last row."""
    lowest, highest = first // row, (first + count - 1) // row if count else -1
    for r in sorted({lowest, highest}) if count else ():
        lo, hi = max(first, r * row + at), min(first + count, r * row + at + width)
        if lo < hi:
            yield Box(lo - first, (hi - lo,), (1,), r * whole_row + whole_at + lo - r * row - at, (1,))
    rows = highest - lowest - 1
    if rows > 0:
        start = (lowest + 1) * row + at
        yield Box(start - first, (rows, width), (row, 1), (lowest + 1) * whole_row + whole_at, (whole_row, 1))


def round_piece_(
    out: torch.Tensor, values: torch.Tensor, key: int, spec: ShardSpec, first: int, *, pool: Pool | None = None
) -> None:
    """:func:`round_stochastic_` of a flat piece of a rank's part of a parameter. first: of its elements, flat."""
    for box in boxes(spec, first, values.numel()):
        places = (box.shape, box.local)
        round_stochastic_(
            out.as_strided(*places, out.storage_offset() + box.start),
            values.as_strided(*places, values.storage_offset() + box.start),
            key,
            box.base,
            box.whole,
            pool=pool,
        )
