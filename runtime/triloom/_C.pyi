"""Types of the native extension. Addresses are integers (``Tensor.data_ptr()``), sizes and strides
count elements, dtype codes are those of ``native.DTYPE_CODES``. Nothing is checked here that needs
the tensor: call through ``native`` and ``philox``."""

from collections.abc import Sequence

from .errors import TriloomError

class NativeError(TriloomError): ...

SUM_BLOCK: int

class Pool:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...

def philox4x32(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def fill_uniform(
    out: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    index_strides: Sequence[int],
    key: int,
    base: int,
    low: float,
    high: float,
    pool: Pool | None,
    /,
) -> None: ...
def fill_normal(
    out: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    index_strides: Sequence[int],
    key: int,
    base: int,
    mean: float,
    std: float,
    pool: Pool | None,
    /,
) -> None: ...
def dropout(
    out: int,
    input: int,
    dtype: int,
    sizes: Sequence[int],
    out_strides: Sequence[int],
    input_strides: Sequence[int],
    index_strides: Sequence[int],
    key: int,
    base: int,
    threshold: int,
    scale: float,
    pool: Pool | None,
    /,
) -> None: ...
def adamw(
    param: int,
    grad: int,
    exp_avg: int,
    exp_avg_sq: int,
    low: int,
    state_dtype: int,
    grad_dtype: int,
    low_dtype: int,
    n: int,
    numbers: Sequence[float],
    pool: Pool | None,
    /,
) -> None: ...
def sqrt(data: int, dtype: int, n: int, pool: Pool | None, /) -> None: ...
def sum_squares_partials(data: int, dtype: int, n: int, partials: int, pool: Pool | None, /) -> bool: ...
def wide_sum(data: int, n: int, /) -> tuple[float, float]: ...
def reduce_ranks(out: int, inputs: Sequence[int], dtype: int, n: int, op: int, pool: Pool | None, /) -> None: ...
