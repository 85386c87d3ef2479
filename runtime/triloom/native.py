"""Checked wrappers over the native kernels, and the same arithmetic for other devices.

Each function takes CPU tensors to the extension and tensors of any other device to the kernels of
:mod:`triloom_kernels` or through torch operations, in the same order, one rounding each: the result has the same bits
on all. Tensors
must be contiguous. Kernels write through the pointer; the version counter of what they write is
advanced, so that autograd notices, and no graph is recorded.

``pool`` is an explicit ``Pool`` of threads; None works on the calling thread. It never changes a
result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from triloom_kernels.adamw import adamw_ as eager_adamw_
from triloom_kernels.table import default

from . import _C
from ._C import NativeError, Pool
from .errors import ConfigError

__all__ = [
    "DTYPE_CODES",
    "FLOATS",
    "SUM_BLOCK",
    "AdamWNumbers",
    "NativeError",
    "Pool",
    "adamw_",
    "adamw_numbers",
    "adamw_reference",
    "reduce_ranks",
    "sqrt",
    "sum_squares",
    "sum_squares_finite",
    "sum_squares_partials",
    "sum_squares_wide",
    "wide_sum",
    "written",
]

DTYPE_CODES: Mapping[torch.dtype, int] = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int64: 4,
}
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)

SUM_BLOCK: int = _C.SUM_BLOCK
"""Elements behind one partial of a sum of squares; cut a flat array at multiples of it to keep its partials."""

_KERNELS = default()
"""For devices other than the CPU."""

REDUCE_CODES: Mapping[str, int] = {"sum": 0, "max": 1, "min": 2}


def _check(name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype], like: torch.Tensor | None = None) -> None:
    """Raise ConfigError unless the tensor is contiguous, of one of the dtypes, and as large and placed as ``like``."""
    if tensor.dtype not in dtypes:
        raise ConfigError(f"{name} has dtype {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ConfigError(
            f"{name} is not contiguous (shape {tuple(tensor.shape)}, strides {tensor.stride()}); call .contiguous()"
        )
    if like is None:
        return
    if tensor.numel() != like.numel():
        raise ConfigError(f"{name} has {tensor.numel()} elements and must have {like.numel()}")
    if tensor.device != like.device:
        raise ConfigError(f"{name} is on {tensor.device} and must be on {like.device}")


def sqrt(tensor: torch.Tensor) -> torch.Tensor:
    """Correctly rounded square root of an fp32 or fp64 tensor, contiguous.

    torch.sqrt is correctly rounded on CUDA, but on the CPU it may call a vector math library that
    is not (MKL: one unit off in every sixth fp32 element).
    """
    _check("tensor", tensor, (torch.float32, torch.float64))
    if tensor.device.type != "cpu":
        return tensor.sqrt()
    out = tensor.clone()
    _C.sqrt(out.data_ptr(), DTYPE_CODES[out.dtype], out.numel(), None)
    return out


class AdamWNumbers(NamedTuple):
    """The numbers of one AdamW update in double, rounded once to the states' dtype by whoever applies them."""

    grad_scale: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    decay: float
    rate: float
    inv_sqrt_correction: float
    eps: float


def adamw_numbers(
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> AdamWNumbers:
    """Numbers of update ``step`` (the first is 1), with the bias corrections of Adam (arXiv 1412.6980).

    Raises ConfigError for values outside lr >= 0, 0 <= beta < 1, eps >= 0, weight_decay >= 0, step >= 1.
    """
    beta1, beta2 = betas
    positive = 0 <= lr < math.inf and 0 <= eps < math.inf and 0 <= weight_decay < math.inf
    if not (positive and 0 <= beta1 < 1 and 0 <= beta2 < 1 and step >= 1):
        raise ConfigError(
            f"AdamW: lr={lr!r}, betas={betas!r}, eps={eps!r}, weight_decay={weight_decay!r}, step={step!r} is out of "
            "range: lr, eps and weight_decay must be finite and >= 0, betas in [0, 1), step >= 1"
        )
    return AdamWNumbers(
        grad_scale=grad_scale,
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        decay=1 - lr * weight_decay,
        rate=lr / (1 - beta1**step),
        inv_sqrt_correction=1 / math.sqrt(1 - beta2**step),
        eps=eps,
    )


def adamw_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    low: torch.Tensor | None = None,
    pool: Pool | None = None,
) -> None:
    """One AdamW update with decoupled decay (arXiv 1711.05101), in place and element-wise.

    param, exp_avg, exp_avg_sq: fp32 or fp64, the same. grad: the same dtype or narrower; it is
    multiplied by ``grad_scale`` (unscale and clip) as it is read. low: optional bf16 or fp16 copy
    of the new parameters. In the states' dtype, each operation rounded once:

        g = grad * grad_scale
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + ((1 - beta2) * g) * g
        p = p * (1 - lr * weight_decay) - (lr / (1 - beta1^step) * m) / (sqrt(v) * (1 / sqrt(1 - beta2^step)) + eps)

    Raises ConfigError for tensors that do not fit together and for numbers out of range, NativeError
    (on the CPU) for tensors that overlap.
    """
    numbers = adamw_numbers(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, step=step, grad_scale=grad_scale)
    _check_adamw(param, grad, exp_avg, exp_avg_sq, low)
    if param.device.type != "cpu":
        _KERNELS.pick("adamw_", param.device)(param, grad, exp_avg, exp_avg_sq, numbers, low)
        return
    code = DTYPE_CODES[param.dtype]
    _C.adamw(
        param.data_ptr(),
        grad.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if low is None else low.data_ptr(),
        code,
        DTYPE_CODES[grad.dtype],
        code if low is None else DTYPE_CODES[low.dtype],
        param.numel(),
        numbers,
        pool,
    )
    written(param, exp_avg, exp_avg_sq, *(() if low is None else (low,)))


def _check_adamw(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    low: torch.Tensor | None,
) -> None:
    _check("param", param, (torch.float32, torch.float64))
    narrower = HALVES if param.dtype == torch.float32 else (torch.float32, *HALVES)
    _check("grad", grad, (param.dtype, *narrower), param)
    _check("exp_avg", exp_avg, (param.dtype,), param)
    _check("exp_avg_sq", exp_avg_sq, (param.dtype,), param)
    if low is not None:
        _check("low", low, HALVES, param)


def adamw_reference(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    numbers: AdamWNumbers,
    low: torch.Tensor | None = None,
) -> None:
    """The update of :func:`adamw_` in torch operations, for any device; unchecked."""
    eager_adamw_(param, grad, exp_avg, exp_avg_sq, numbers, low, sqrt=sqrt)


def written(*tensors: torch.Tensor) -> None:
    """Tell autograd that the tensors changed behind its back (inference tensors have nothing to tell)."""
    torch.autograd.graph.increment_version([t for t in tensors if not t.is_inference()])


def sum_squares_partials(tensor: torch.Tensor, *, pool: Pool | None = None) -> tuple[torch.Tensor, bool]:
    """Sums of squares of the blocks of SUM_BLOCK elements, and whether every element is finite.

    tensor: floating-point, contiguous. Returns fp64 on the tensor's device, one entry per block; a
    block is summed by a balanced tree (the upper half added onto the lower), short ones as if
    padded with zeros. A tensor cut at multiples of SUM_BLOCK has the partials of its pieces.
    """
    _check("tensor", tensor, FLOATS)
    n = tensor.numel()
    if tensor.device.type != "cpu":
        partials = _KERNELS.pick("square_sums", tensor.device)(tensor)
        told = tensor if tensor.dtype == torch.float64 else partials  # the square of a finite fp32 number is finite
        return partials, bool(told.isfinite().all())
    partials = torch.empty(-(-n // SUM_BLOCK), dtype=torch.float64)
    finite = _C.sum_squares_partials(tensor.data_ptr(), DTYPE_CODES[tensor.dtype], n, partials.data_ptr(), pool)
    return partials, finite


def wide_sum(values: torch.Tensor) -> tuple[float, float]:
    """Sum of an fp64 tensor as (high, low), ``high`` being the sum rounded to double.

    Carried in about twice the precision of a double, so that order and grouping do not matter:
    ``math.fsum`` over the pairs of the parts is the sum of the whole. The tensor is brought to the host.
    """
    _check("values", values, (torch.float64,))
    host = values.detach().cpu()
    return _C.wide_sum(host.data_ptr(), host.numel())


def sum_squares_wide(tensor: torch.Tensor, *, pool: Pool | None = None) -> tuple[float, float]:
    """Sum of squares as (high, low), see :func:`wide_sum`: the same in whatever parts, cut at multiples of
    SUM_BLOCK, it is computed, on any device and with any number of threads."""
    return wide_sum(sum_squares_partials(tensor, pool=pool)[0])


def sum_squares_finite(tensor: torch.Tensor, *, pool: Pool | None = None) -> tuple[float, bool]:
    """Sum of squares in fp64 and whether every element is finite, in one pass.

    With a non-finite element the sum is inf or NaN; an fp64 sum may also overflow with all elements finite.
    """
    partials, finite = sum_squares_partials(tensor, pool=pool)
    return wide_sum(partials)[0], finite


def sum_squares(tensor: torch.Tensor, *, pool: Pool | None = None) -> float:
    """Sum of squares in fp64; see :func:`sum_squares_finite`."""
    return sum_squares_finite(tensor, pool=pool)[0]


def _max(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.maximum(a, b)


def _min(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.minimum(a, b)


def _sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


_COMBINE: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"sum": _sum, "max": _max, "min": _min}


def reduce_ranks(
    out: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    op: str = "sum",
    *,
    pool: Pool | None = None,
) -> None:
    """``out = ((inputs[0] op inputs[1]) op inputs[2]) ...`` element by element.

    All of one dtype (fp32, fp64, bf16, fp16, int64) and size, contiguous. 16-bit floats are
    combined in fp32 and rounded once, to nearest even; the others in their own dtype (int64
    wraps). max and min propagate NaN. ``out`` may be one of the inputs, but not overlap one in part.

    Raises ConfigError, for overlap NativeError, naming the input that does not fit.
    """
    if op not in REDUCE_CODES:
        raise ConfigError(f"reduce_ranks: op {op!r} is not one of {', '.join(REDUCE_CODES)}")
    if not inputs:
        raise ConfigError("reduce_ranks: there are no inputs to reduce")
    _check("out", out, tuple(DTYPE_CODES))
    for r, x in enumerate(inputs):
        _check(f"inputs[{r}]", x, (out.dtype,), out)
    if out.device.type != "cpu":
        _reduce_reference(out, inputs, op)
        return
    _C.reduce_ranks(
        out.data_ptr(), [x.data_ptr() for x in inputs], DTYPE_CODES[out.dtype], out.numel(), REDUCE_CODES[op], pool
    )
    written(out)


@torch.no_grad()
def _reduce_reference(out: torch.Tensor, inputs: Sequence[torch.Tensor], op: str) -> None:
    """:func:`reduce_ranks` in torch operations, for any device."""
    wide = torch.float32 if out.dtype in HALVES else out.dtype
    acc = inputs[0].reshape(-1).to(wide)
    for x in inputs[1:]:
        acc = _COMBINE[op](acc, x.reshape(-1).to(wide))
    out.view(-1).copy_(acc)
