"""What goes over the wire: tensors cast and packed into a bucket, 8-bit blocks, and the largest elements.

The kernels are in :mod:`triloom_kernels.packed`. Packed forms are int64 words, a dtype that every transport carries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 8


@torch.no_grad()
def pack_(out: Tensor, tensors: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """``tensors * scale``, one after the other, in the flat ``out`` and its dtype; computed in fp32 (fp64 for fp64).

    tensors: contiguous, of one dtype and device, together as long as out.
    """
    check(out, tensors)
    for piece, x in zip(_pieces(out, tensors), tensors, strict=True):
        wide = x.reshape(-1) if x.dtype == torch.float64 else x.reshape(-1).float()
        piece.copy_(wide * scale)
    return out


@torch.no_grad()
def unpack_add_(tensors: Sequence[Tensor], flat: Tensor, scale: float = 1.0) -> None:
    """Add ``flat * scale`` to the tensors it was packed from, in place; computed in fp32 (fp64 for fp64)."""
    check(flat, tensors)
    for piece, x in zip(_pieces(flat, tensors), tensors, strict=True):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x.copy_(x.to(dtype) + (piece.to(dtype) * scale).view_as(x))


def _pieces(flat: Tensor, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(flat, [x.numel() for x in tensors])


def check(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError for tensors that do not make up the flat one."""
    total = sum(x.numel() for x in tensors)
    if flat.dim() != 1 or flat.numel() != total or not flat.is_contiguous():
        raise ValueError(
            f"a bucket of shape {tuple(flat.shape)} does not hold {total} elements; give a flat contiguous one"
        )
    kinds = {(x.dtype, x.device) for x in tensors}
    if len(kinds) > 1 or any(not x.is_contiguous() for x in tensors):
        raise ValueError(
            f"tensors of a bucket must be contiguous and of one dtype and device, got {sorted(map(str, kinds))}"
        )


@torch.no_grad()
def quantise(x: Tensor, block: int) -> Tensor:
    """Each row of ``x`` ``[rows, n]`` in 8 bits: int64 words ``[rows, ceil((n + 4 n / block) / 8)]``.

    A row is its n codes, then an fp32 scale for each ``block`` elements, then zeros: linear to [-127, 127], the largest
    magnitude over 127 being the scale, rounded to nearest even. A block with inf or nan decodes to one. n is a multiple
    of block.
    """
    rows = len(x)
    blocks = x.reshape(rows, -1, block).float()
    scale = blocks.abs().amax(-1) / torch.tensor(127.0, device=x.device)  # a true division on every device
    unit = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (blocks / unit.unsqueeze(-1)).round().nan_to_num(0, 0, 0).to(torch.int8)
    raw = torch.cat([codes.view(rows, -1).view(torch.uint8), scale.contiguous().view(torch.uint8)], dim=1)
    return torch.nn.functional.pad(raw, (0, -raw.shape[1] % WORD)).contiguous().view(torch.int64)


@torch.no_grad()
def dequantise_sum_(out: Tensor, packed: Tensor, block: int) -> Tensor:
    """The sum of the rows of ``packed``, from the first to the last in fp32, in ``out`` ``[n]`` and its dtype."""
    n = out.numel()
    total = torch.zeros(n // block, block, dtype=torch.float32, device=out.device)
    for row in packed.view(torch.uint8).view(len(packed), -1):
        scales = row[n : n + 4 * (n // block)].contiguous().view(torch.float32)
        total += row[:n].contiguous().view(torch.int8).float().view(-1, block) * scales.unsqueeze(-1)
    return out.copy_(total.view(-1))


@torch.no_grad()
def take_largest(x: Tensor, left: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest magnitudes of each row of ``x + left``, and what is left of them: error feedback.

    x, left: ``[rows, n]``, fp32 or fp64. Returns ``(packed, rest)``: int64 words ``[rows, count]`` of (int32 index,
    fp32 value), and ``x + left`` with what was packed taken off, of x's dtype. Which of equal magnitudes are taken is
    torch.topk's choice.
    """
    pending = x + left
    index = pending.abs().topk(count, dim=1).indices
    values = pending.gather(1, index)
    sent = values.float()
    packed = torch.stack([index.int(), sent.view(torch.int32)], dim=-1).view(torch.int64).squeeze(-1)
    return packed, pending.scatter_(1, index, values - sent.to(values.dtype))


@torch.no_grad()
def add_taken_(out: Tensor, packed: Tensor) -> Tensor:
    """Put the sum of packed rows into ``out`` ``[n]``, the first row first; zero where nothing was packed."""
    out.zero_()
    for row in packed.view(torch.int32).view(len(packed), -1, 2):
        out[row[:, 0].long()] += row[:, 1].contiguous().view(torch.float32).to(out.dtype)
    return out
