"""A weight's gradient added to an fp32 accumulator: ``out += grad^T x`` of 16-bit factors.

Not in the table: until a GPU has measured it against torch's product with an fp32 result
(``fused_loss.add_product_``), the latter is used. ``python -m triloom_kernels.bench weight_product`` compares the two.
"""

from __future__ import annotations

from torch import Tensor

from . import tuning
from .launching import architecture, launch, tl, triton


@triton.jit
def _add_product(
    out, grad, x, rows, height, width, grad_stride, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of out. Tiles are numbered down GROUP rows of tiles before the next column, so that neighbours in time
    share what they read in the cache."""
    program = tl.program_id(0)
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    band = program // (GROUP * across)
    tall = tl.minimum(down - band * GROUP, GROUP)
    inside = program % (GROUP * across)
    m = (band * GROUP + inside % tall) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (inside // tall) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rows, BLOCK_K):
        row = (start + k).to(tl.int64)
        a = tl.load(grad + row[None, :] * grad_stride + m[:, None], (row < rows)[None, :] & (m < height)[:, None], 0.0)
        b = tl.load(x + row[:, None] * x_stride + n[None, :], (row < rows)[:, None] & (n < width)[None, :], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    at = out + m.to(tl.int64)[:, None] * width + n[None, :]
    held = (m < height)[:, None] & (n < width)[None, :]
    tl.store(at, tl.load(at, mask=held, other=0.0) + total, mask=held)


def add_product_(out: Tensor, grad: Tensor, x: Tensor) -> None:
    """``out += grad^T x``, summed in fp32. grad: ``[n, v]``; x: ``[n, h]``, of one dtype, rows contiguous (otherwise a
    copy is made); out: fp32 ``[v, h]``, contiguous. The order of the sum is fixed."""
    grad, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (grad, x))
    (rows, height), width = grad.shape, x.shape[1]
    options = tuning.options("weight_product", architecture(out.device), bytes=grad.element_size())
    tiles = triton.cdiv(height, options["BLOCK_M"]) * triton.cdiv(width, options["BLOCK_N"])
    launch(_add_product, (tiles,), out, grad, x, rows, height, width, grad.stride(0), x.stride(0), **options)
