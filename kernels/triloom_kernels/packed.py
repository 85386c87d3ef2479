"""Kernels of :mod:`triloom_kernels.packing`: each byte read and written once, the same bits as the eager ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import packing, tuning
from .launching import architecture, launch, tl, triton
from .packing import WORD, check
from .rows import widen


@triton.jit
def _move(flat, like, table, count, scale, ADD: tl.constexpr, SIZE: tl.constexpr):
    """One program for SIZE elements of one tensor. like: of the tensors' dtype, not read. table (int64): addresses of
    the tensors, their begins in flat, their lengths, their first programs, and the tensor of each program."""
    program = tl.program_id(0)
    own = tl.load(table + 4 * count + program)
    begin, size = tl.load(table + count + own), tl.load(table + 2 * count + own)
    inside = (program - tl.load(table + 3 * count + own)) * SIZE + tl.arange(0, SIZE)
    live = inside < size
    x = tl.load(table + own).to(tl.pointer_type(like.dtype.element_ty)) + inside
    bucket = flat + begin + inside
    value = widen(tl.load(x, mask=live, other=0.0))
    if ADD:
        value += widen(tl.load(bucket, mask=live, other=0.0)) * scale
        tl.store(x, value.to(like.dtype.element_ty), mask=live)
    else:
        tl.store(bucket, (value * scale).to(flat.dtype.element_ty), mask=live)


def _launch_move(flat: Tensor, tensors: Sequence[Tensor], scale: float, *, add: bool) -> None:
    check(flat, tensors)
    full = [x for x in tensors if x.numel()]
    if not full:
        return
    options = tuning.options("pack", architecture(flat.device))
    sizes = torch.tensor([x.numel() for x in full])
    programs = -(-sizes // options["SIZE"])
    owners = torch.repeat_interleave(torch.arange(len(full)), programs)
    addresses = torch.tensor([0 if x.device.type == "meta" else x.data_ptr() for x in full])
    rows = torch.cat([addresses, sizes.cumsum(0) - sizes, sizes, programs.cumsum(0) - programs, owners])
    table = rows.pin_memory().to(flat.device, non_blocking=True) if flat.is_cuda else rows.to(flat.device)
    launch(
        _move, (len(owners),), flat, full[0], table, len(full), scale, ADD=add, enable_fp_fusion=False, **options
    )  # fmt: skip


def pack_(out: Tensor, tensors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """As :func:`triloom_kernels.packing.pack_`, in one launch however many tensors there are."""
    _launch_move(out, tensors, scale, add=False)
    return out


def unpack_add_(tensors: Sequence[Tensor], flat: Tensor, scale: float = 1.0) -> None:
    """As :func:`triloom_kernels.packing.unpack_add_`, in one launch."""
    _launch_move(flat, tensors, scale, add=True)


@triton.jit
def _quantise(x, codes, scales, rows_bytes, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """codes and scales: the packed rows as int8 and as fp32."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (block < blocks)[:, None] & (inside >= 0)
    v = tl.load(x + row * (blocks * BLOCK) + inside, mask=live, other=0.0).to(tl.float32)
    strange = tl.max((v != v).to(tl.int32), 1) != 0
    scale = tl.where(strange, float("nan"), tl.div_rn(tl.max(tl.abs(v), 1), tl.full((ROWS,), 127.0, tl.float32)))
    unit = tl.where(scale > 0, scale, 1.0)
    share = tl.div_rn(v, unit[:, None] + tl.zeros_like(v))
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even
    whole = (share + magic) - magic
    whole = tl.where(whole == whole, whole, 0.0)
    tl.store(codes + row * rows_bytes + inside, whole.to(tl.int8), mask=live)
    begin = row * (rows_bytes // 4) + (blocks * BLOCK) // 4
    tl.store(scales + begin + block, scale, mask=block < blocks)
    words = (rows_bytes - blocks * BLOCK) // 4  # of scales and zeros
    tl.store(scales + begin + block, tl.zeros_like(scale), mask=(block >= blocks) & (block < words))


@triton.jit
def _dequantise_sum(out, codes, scales, rows, rows_bytes, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    live = (block < blocks)[:, None] & (inside >= 0)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    place = inside
    place4 = (blocks * BLOCK) // 4 + block
    for _ in range(rows):
        scale = tl.load(scales + place4, mask=block < blocks, other=0.0)
        total += tl.load(codes + place, mask=live, other=0).to(tl.float32) * scale[:, None]
        place += rows_bytes
        place4 += rows_bytes // 4
    tl.store(out + inside, total.to(out.dtype.element_ty), mask=live)


def quantise(x: Tensor, block: int) -> Tensor:
    """As :func:`triloom_kernels.packing.quantise`, the same bits; x contiguous."""
    rows, n = x.shape
    if x.dtype == torch.float64:
        return packing.quantise(x, block)
    blocks = n // block
    words = -(-(n + 4 * blocks) // WORD)
    packed = torch.empty(rows, words, dtype=torch.int64, device=x.device)
    options = tuning.options("quantise", architecture(x.device))
    # One block more than there are: it writes the zero after an odd number of scales.
    grid = (triton.cdiv(blocks + 1, options["ROWS"]), rows)
    codes, scales = packed.view(torch.int8), packed.view(torch.float32)
    launch(
        _quantise, grid if n else (0, rows), x, codes, scales, words * WORD, blocks,
        BLOCK=block, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return packed


def dequantise_sum_(out: Tensor, packed: Tensor, block: int) -> Tensor:
    """As :func:`triloom_kernels.packing.dequantise_sum_`, the same bits; out and packed contiguous."""
    if out.dtype == torch.float64:
        return packing.dequantise_sum_(out, packed, block)
    rows, words = packed.shape
    blocks = out.numel() // block
    options = tuning.options("quantise", architecture(out.device))
    codes, scales = packed.view(torch.int8), packed.view(torch.float32)
    launch(
        _dequantise_sum, (triton.cdiv(blocks, options["ROWS"]),), out, codes, scales, rows, words * WORD, blocks,
        BLOCK=block, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return out


@triton.jit
def _take(pending, index, packed, count, n, SIZE: tl.constexpr):
    """Packs what is at the indices of a row, and leaves there what fp32 does not hold of it."""
    row = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = k < count
    at = tl.load(index + row * count + k, mask=live, other=0)
    value = tl.load(pending + row * n + at, mask=live, other=0.0)
    sent = value.to(tl.float32)
    word = (sent.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | at.to(tl.uint32).to(tl.uint64)
    tl.store(packed + row * count + k, word.to(tl.int64, bitcast=True), mask=live)
    tl.store(pending + row * n + at, value - sent.to(value.dtype), mask=live)


@triton.jit
def _add_taken(out, packed, count, SIZE: tl.constexpr):
    """Adds one row, in which no index comes twice."""
    k = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = k < count
    word = tl.load(packed + k, mask=live, other=0).to(tl.uint64, bitcast=True)
    at = (word & 0xFFFFFFFF).to(tl.int64)
    value = (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    total = tl.load(out + at, mask=live, other=0.0) + value.to(out.dtype.element_ty)
    tl.store(out + at, total, mask=live)


def take_largest(x: Tensor, left: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`triloom_kernels.packing.take_largest`; the selection is torch.topk's (on GPUs a radix selection)."""
    pending = x + left
    index = pending.abs().topk(count, dim=1).indices
    packed = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    options = tuning.options("take", architecture(x.device))
    grid = (triton.cdiv(count, options["SIZE"]), len(x))
    launch(_take, grid, pending, index, packed, count, x.shape[1], **options)
    return packed, pending


def add_taken_(out: Tensor, packed: Tensor) -> Tensor:
    """As :func:`triloom_kernels.packing.add_taken_`: a launch for each row, one after the other."""
    out.zero_()
    options = tuning.options("take", architecture(out.device))
    for row in packed:
        launch(_add_taken, (triton.cdiv(len(row), options["SIZE"]),), out, row, len(row), **options)
    return out
