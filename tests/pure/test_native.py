"""Native kernels against torch arithmetic in the same order, bit for bit, at awkward sizes and values."""

from __future__ import annotations

import functools
import hashlib
import math
import struct

import pytest
import torch

from triloom import native, philox
from triloom.errors import ConfigError
from triloom_kernels.sums import square_sums

SIZES = (0, 1, 7, 4096, 4097, 70_001)
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
GRADS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}


def draw(n: int, dtype: torch.dtype, seed: int, offset: int = 0, std: float = 1.0) -> torch.Tensor:
    """n normals in memory that starts ``offset`` elements into an allocation (so not aligned to vectors)."""
    return philox.normal_(torch.empty(n + offset, dtype=dtype)[offset:], seed, 0, (1,), 0.0, std)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, signs of zero included; any NaN equals any NaN."""
    nan = torch.isnan(a) if a.is_floating_point() else torch.zeros_like(a, dtype=torch.bool)
    if a.is_floating_point() and not torch.equal(nan, torch.isnan(b)):
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a[~nan].view(integer), b[~nan].view(integer))


def halves(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


# conversions


@pytest.mark.parametrize("dtype", native.HALVES)
@pytest.mark.parametrize("state", (torch.float32, torch.float64))
def test_every_16_bit_value_is_read_exactly(dtype, state):
    grad = halves(dtype)
    p, m, v = (torch.zeros(grad.numel(), dtype=state) for _ in range(3))
    native.adamw_(p, grad, m, v, lr=0.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0, step=1)
    assert same_bits(m, grad.to(state) + 0.0)  # 0 * m + g turns -0 into 0


@pytest.mark.parametrize("dtype", native.HALVES)
@pytest.mark.parametrize("state", (torch.float32, torch.float64))
def test_rounding_to_16_bits(dtype, state):
    """Every value, the ties between neighbours and what lies beside the ties; overflow, subnormals, NaN."""
    x = halves(dtype)
    x = x[torch.isfinite(x)].float().sort().values
    ties = (x[:-1].double() + x[1:].double()) / 2
    tie = ties.float()
    beside = [torch.nextafter(tie, torch.tensor(s)) for s in (-math.inf, math.inf)]
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 65519.9, 65520.0, 1e-45, -1e-45])
    values = torch.cat([x, tie, *beside, special, draw(10_000, torch.float32, 1, std=1e-5)]).to(state)
    low = torch.empty(values.numel(), dtype=dtype)
    zero = [torch.zeros_like(values) for _ in range(3)]
    native.adamw_(values.clone(), *zero, lr=0.0, betas=(0.9, 0.9), eps=1.0, weight_decay=0.0, step=1, low=low)
    assert same_bits(low, values.to(dtype))


def test_square_root_is_correctly_rounded():
    from fractions import Fraction

    x = draw(500, torch.float64, 3).abs()
    for value, root in zip(x.tolist(), native.sqrt(x).tolist(), strict=True):
        assert root == math.sqrt(value)
    single = x.float()
    for value, root in zip(single.tolist(), native.sqrt(single).tolist(), strict=True):
        below, above = (Fraction(float(torch.nextafter(torch.tensor(root), torch.tensor(s)))) for s in (0.0, math.inf))
        assert ((below + Fraction(root)) / 2) ** 2 <= Fraction(value) <= ((above + Fraction(root)) / 2) ** 2


# AdamW


@functools.cache
def torch_adamw(dtype: torch.dtype, n: int, steps: int) -> torch.Tensor:
    param = torch.nn.Parameter(draw(n, dtype, 1))
    optimizer = torch.optim.AdamW([param], fused=False, foreach=False, **HYPER)
    for step in range(1, steps + 1):
        param.grad = draw(n, dtype, 10 + step)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("state", "grad"), [(s, g) for s, gs in GRADS.items() for g in gs])
def test_adamw_equals_the_torch_reference(state, grad, n):
    pool = native.Pool(2)
    for offset, low_dtype in ((0, None), (1, torch.bfloat16), (3, torch.float16)):
        ours = [draw(n, state, 1, offset), torch.zeros(n + offset, dtype=state)[offset:]]
        ours.append(torch.zeros(n + offset, dtype=state)[offset:])
        theirs = [t.clone() for t in ours]
        low = None if low_dtype is None else torch.empty(n + offset, dtype=low_dtype)[offset:]
        low_reference = None if low is None else torch.empty_like(low)
        for step in (1, 2, 3):
            g = draw(n, grad, 10 + step, offset)
            scale = {"grad_scale": 0.37, "step": step}
            native.adamw_(ours[0], g, *ours[1:], low=low, pool=pool, **HYPER, **scale)
            numbers = native.adamw_numbers(**HYPER, **scale)
            native.adamw_reference(theirs[0], g, *theirs[1:], numbers, low_reference)
        assert all(same_bits(a, b) for a, b in zip(ours, theirs, strict=True))
        assert low is None or (same_bits(low, low_reference) and same_bits(low, ours[0].to(low_dtype)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_adamw_against_torch_optim(dtype, tolerance):
    n, steps = 4097, 6
    p, m, v = draw(n, dtype, 1), torch.zeros(n, dtype=dtype), torch.zeros(n, dtype=dtype)
    for step in range(1, steps + 1):
        native.adamw_(p, draw(n, dtype, 10 + step), m, v, step=step, **HYPER)
    torch.testing.assert_close(p, torch_adamw(dtype, n, steps), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_adamw_vector_body_equals_its_tail(dtype):
    n = 67
    at_once = [draw(n, dtype, k).abs() for k in range(4)]
    one_by_one = [t.clone() for t in at_once]
    p, m, v, g = at_once
    native.adamw_(p, g, m, v, step=2, **HYPER)
    for i in range(n):
        p1, m1, v1, g1 = (t[i : i + 1] for t in one_by_one)
        native.adamw_(p1, g1, m1, v1, step=2, **HYPER)
    assert all(same_bits(a, b) for a, b in zip(at_once, one_by_one, strict=True))


def test_adamw_lets_bad_gradients_through():
    for value in (math.nan, math.inf):
        grad = torch.zeros(100)
        grad[41] = value
        p, m, v = torch.ones(100), torch.zeros(100), torch.zeros(100)
        native.adamw_(p, grad, m, v, step=1, **HYPER)
        assert torch.isfinite(p).nonzero().flatten().tolist() == [i for i in range(100) if i != 41]


def test_adamw_shapes_and_parameters():
    p = torch.nn.Parameter(torch.ones(3, 4))
    m, v = torch.zeros(12), torch.zeros(3, 4)
    native.adamw_(p, torch.ones(12), m, v, step=1, **HYPER)
    q, m2, v2 = torch.ones(3, 4), torch.zeros(12), torch.zeros(3, 4)
    native.adamw_reference(q, torch.ones(12), m2, v2, native.adamw_numbers(step=1, **HYPER))
    assert torch.equal(p, q)
    assert torch.equal(m, m2)


def adamw_with(**changes: object) -> None:
    arguments = {name: torch.zeros(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
    native.adamw_(**{**arguments, **HYPER, "step": 1, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"param": torch.zeros(4, dtype=torch.bfloat16)}, "param has dtype torch.bfloat16"),
        ({"grad": torch.zeros(5)}, "grad has 5 elements and must have 4"),
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "grad has dtype torch.float64"),
        ({"exp_avg": torch.zeros(8)[::2]}, "exp_avg is not contiguous"),
        ({"exp_avg_sq": torch.zeros(4, dtype=torch.float64)}, "exp_avg_sq has dtype"),
        ({"exp_avg_sq": torch.zeros(4, device="meta")}, "exp_avg_sq is on meta"),
        ({"low": torch.zeros(4)}, "low has dtype"),
        ({"lr": -1.0}, "lr=-1"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"step": 0}, "step=0"),
        ({"eps": math.inf}, "eps=inf"),
    ],
)
def test_adamw_errors(changes, message):
    with pytest.raises(ConfigError, match=message):
        adamw_with(**changes)


def test_adamw_refuses_overlap():
    flat = torch.zeros(10)
    with pytest.raises(native.NativeError, match="exp_avg and exp_avg_sq overlap"):
        adamw_with(exp_avg=flat[:4], exp_avg_sq=flat[3:7])
    adamw_with(exp_avg=flat[:4], exp_avg_sq=flat[4:8])


# sum of squares


@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize("n", (*SIZES, 2047, 2049, 8192))
def test_sum_of_squares(dtype, n):
    x = draw(n, dtype, 5)
    total, finite = native.sum_squares_finite(x)
    assert finite
    assert total == pytest.approx(math.fsum(v * v for v in x.tolist()), rel=1e-13)
    partials, _ = native.sum_squares_partials(x)
    assert same_bits(partials, square_sums(x))
    for offset in (1, 3):
        assert native.sum_squares(draw(n, dtype, 5, offset), pool=native.Pool(3)) == total


def test_partials_of_pieces():
    x = draw(5 * native.SUM_BLOCK + 77, torch.float32, 5)
    cut = 2 * native.SUM_BLOCK
    whole, _ = native.sum_squares_partials(x)
    parts = torch.cat([native.sum_squares_partials(p)[0] for p in (x[:cut], x[cut:])])
    assert torch.equal(whole, parts)
    assert native.wide_sum(parts) == native.sum_squares_wide(x)
    cut_pairs = [v for p in (x[:cut], x[cut:]) for v in native.sum_squares_wide(p)]
    assert math.fsum(cut_pairs) == native.sum_squares(x)


@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_one_bad_element_is_found(dtype, value):
    n = 3 * native.SUM_BLOCK + 5
    for at in (0, 31, 32, native.SUM_BLOCK, n - 1):
        x = torch.ones(n, dtype=dtype)
        x[at] = value
        total, finite = native.sum_squares_finite(x)
        assert not finite
        assert not math.isfinite(total)
        assert not square_sums(x).isfinite().all()


def test_large_and_small_values():
    assert native.sum_squares_finite(torch.full((9,), 3e38)) == (9 * float(torch.tensor(3e38)) ** 2, True)
    assert native.sum_squares(torch.full((4,), 1e-45)) == 4 * float(torch.tensor(1e-45)) ** 2
    assert native.sum_squares_finite(torch.full((9,), 1e200, dtype=torch.float64)) == (math.inf, True)


def test_sum_of_squares_errors():
    with pytest.raises(ConfigError, match="int64"):
        native.sum_squares(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="not contiguous"):
        native.sum_squares(torch.ones(3, 4).t())


# ordered reduction


def ranks(dtype: torch.dtype, n: int, count: int, offset: int = 0) -> list[torch.Tensor]:
    if dtype.is_floating_point:
        return [draw(n, dtype, 50 + r, offset) for r in range(count)]
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(-(2**62), 2**62, (n + offset,), generator=generator)[offset:] for _ in range(count)]


@pytest.mark.parametrize("dtype", tuple(native.DTYPE_CODES))
@pytest.mark.parametrize("op", tuple(native.REDUCE_CODES))
@pytest.mark.parametrize("n", SIZES)
def test_reduction_in_rank_order(dtype, op, n):
    for count, offset, pool in ((1, 0, None), (2, 1, native.Pool(2)), (5, 3, None)):
        inputs = ranks(dtype, n, count, offset)
        out = torch.zeros(n + offset, dtype=dtype)[offset:]
        native.reduce_ranks(out, inputs, op, pool=pool)
        expected = torch.empty(n, dtype=dtype)
        native._reduce_reference(expected, inputs, op)
        assert same_bits(out, expected)


def test_reduction_keeps_the_order_of_ranks():
    big = [torch.tensor([v]) for v in (1e8, 1.0, -1e8)]
    out = torch.empty(1)
    native.reduce_ranks(out, big)
    assert out.item() == 0.0
    native.reduce_ranks(out, [big[0], big[2], big[1]])
    assert out.item() == 1.0


@pytest.mark.parametrize("dtype", native.HALVES)
def test_16_bit_sums_are_rounded_once(dtype):
    step = torch.finfo(dtype).eps / 4
    inputs = [torch.tensor([v], dtype=dtype) for v in (1.0, step, step, step)]
    out = torch.empty(1, dtype=dtype)
    native.reduce_ranks(out, inputs)
    assert out.item() == 1.0 + 4 * step, "three quarters of a unit round up, one at a time they vanish"


@pytest.mark.parametrize("dtype", tuple(native.DTYPE_CODES))
def test_reduction_into_an_input(dtype):
    inputs = ranks(dtype, 5001, 3)
    expected = torch.empty(5001, dtype=dtype)
    native.reduce_ranks(expected, inputs)
    for r in range(3):
        mine = [t.clone() for t in inputs]
        native.reduce_ranks(mine[r], mine)
        assert same_bits(mine[r], expected)


@pytest.mark.parametrize("dtype", native.FLOATS)
@pytest.mark.parametrize("op", tuple(native.REDUCE_CODES))
def test_reduction_propagates_nan_and_infinity(dtype, op):
    values = [math.nan, math.inf, -math.inf, 1.0]
    grid = [(a, b) for a in values for b in values]
    first, second = (torch.tensor([pair[k] for pair in grid], dtype=dtype) for k in (0, 1))
    out = torch.empty(len(grid), dtype=dtype)
    native.reduce_ranks(out, [first, second], op)
    whole = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}[op](first.double(), second.double())
    assert same_bits(out, whole.to(dtype))


def test_integer_sums_wrap():
    out = torch.empty(1, dtype=torch.int64)
    native.reduce_ranks(out, [torch.tensor([2**63 - 1]), torch.tensor([1])])
    assert out.item() == -(2**63)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: native.reduce_ranks(x[:4], [x[4:8]], "mean"), "'mean' is not one of sum, max, min"),
        (lambda x: native.reduce_ranks(x[:4], []), "no inputs"),
        (lambda x: native.reduce_ranks(x[:4], [x[4:8], x[4:7]]), r"inputs\[1\] has 3 elements"),
        (lambda x: native.reduce_ranks(x[:4], [x[4:8].double()]), r"inputs\[0\] has dtype torch.float64"),
        (lambda x: native.reduce_ranks(x[:4], [x[:8:2]]), r"inputs\[0\] is not contiguous"),
        (lambda x: native.reduce_ranks(x.to(torch.int32), [x]), "out has dtype torch.int32"),
    ],
)
def test_reduction_errors(call, message):
    with pytest.raises(ConfigError, match=message):
        call(torch.zeros(10))


def test_reduction_refuses_partial_overlap():
    x = torch.zeros(10)
    with pytest.raises(native.NativeError, match=r"overlaps inputs\[1\]"):
        native.reduce_ranks(x[:4], [x[4:8], x[2:6]])


# autograd


def test_autograd_notices_a_write():
    weight, out = torch.ones(4, requires_grad=True), torch.ones(4)
    product = (weight * out).sum()
    native.reduce_ranks(out, [torch.ones(4), torch.ones(4)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_writes_to_inference_tensors():
    with torch.inference_mode():
        out = torch.empty(4)
        native.reduce_ranks(out, [torch.ones(4), torch.ones(4)])
        philox.normal_(torch.empty(4), 1, 0, (1,))
    assert out.tolist() == [2.0] * 4


# the promise


def digest() -> str:
    """A hash of what every kernel makes of fixed inputs."""
    h = hashlib.sha256()

    def add(t: torch.Tensor) -> None:
        h.update(t.contiguous().view(torch.uint8).numpy().tobytes())

    for dtype in native.FLOATS:
        add(draw(9001, dtype, 1))
        add(philox.uniform_(torch.empty(9001, dtype=dtype), 2, 5, (3,), -1.0, 1.0))
        add(philox.dropout(draw(9001, dtype, 1), 0.3, 2, 1, (1,)))
        h.update(struct.pack("<d", native.sum_squares(draw(9001, dtype, 3))))
        out = torch.empty(9001, dtype=dtype)
        native.reduce_ranks(out, [draw(9001, dtype, s) for s in range(4)])
        add(out)
    for state, grads in GRADS.items():
        for grad in grads:
            p, m, v, low = (
                draw(9001, state, 1),
                *torch.zeros(2, 9001, dtype=state),
                torch.empty(9001, dtype=torch.bfloat16),
            )
            for step in (1, 2):
                native.adamw_(p, draw(9001, grad, step), m, v, step=step, grad_scale=0.3, low=low, **HYPER)
            for t in (p, m, v, low):
                add(t)
    return h.hexdigest()


def test_bits_are_those_of_every_machine():
    """A machine with another instruction set, compiler or C library must come to the same hash."""
    assert digest() == "d271adb9706510c857e48973dcc4e54c1acd34f2c11f6ced2eddfe756e409bf7"
