"""The placement table: where each class of training state lives.

Memory is a table, not a mode: for parameters, gradients, optimizer state and activations a row
says whether it is sharded over dp, in which dtype, on which tier, and how often gradients are
reduced. The well-known systems are named rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .errors import ConfigError

DTYPES = ("float32", "float64", "bfloat16", "float16")
TIERS = ("device",)
ACTIVATIONS = ("keep", "selective", "recompute", "budget")
REDUCTIONS = ("exact", "bfloat16", "int8", "topk")
"""Names of how gradients travel over dp (``parallel.reduction``)."""
CADENCES = ("step", "microbatch")
ROUNDINGS = ("master", "stochastic", "kahan")


@dataclass(frozen=True, kw_only=True)
class State:
    """Where one class of state lives."""

    sharded: bool = False
    """Split over dp (True) or held whole by every dp rank."""
    dtype: str | None = None
    """Torch dtype name; None keeps the model's."""
    tier: str = "device"
    """Memory tier that holds it between uses."""

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.tier not in TIERS:
            raise ConfigError(f"tier {self.tier!r} is not one of {', '.join(TIERS)}")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One row per class of state, and the flat layout's two numbers."""

    params: State = field(default_factory=State)
    grads: State = field(default_factory=State)
    optimizer: State = field(default_factory=State)
    bucket_bytes: int = 16 << 20
    """Bytes of gradient per bucket of the flat layout (rounded up to whole parameters)."""
    activations: str = "keep"
    """What becomes of the tensors that autograd saves from a unit's forward to its backward. ``keep`` them;
    ``recompute`` them (of all units but the loss, whose backward follows its forward); ``selective``: the layers
    themselves recompute the inside of attention; ``budget``: recompute the units that save enough for
    ``activation_bytes`` at the least cost."""
    activation_bytes: int | None = None
    """Most bytes of activations on a rank, for ``budget``."""
    cadence: str = "step"
    """``step``: gradients are reduced once a step. ``microbatch``: after each, into the accumulated shard; another
    order of additions, so other bits. Tied parameters are always reduced once a step."""
    prefetch: int = 1
    """Sharded parameters are gathered this many computes before their use."""
    keep: bool = False
    """Sharded parameters stay whole from their first use of a step to their last."""
    persist: int = 0
    """Sharded parameters of fewer elements than this stay whole from step to step, in buckets of their own. None do by
    default: a bucket gathers all parameters of a unit in one call, so the small ones in it cost none of their own."""
    shard_ranks: int | None = None
    """State is sharded inside neighbouring dp ranks of this number and replicated across them (hybrid sharding,
    PyTorch FSDP, arXiv 2304.11277, section 3.2.2); divides dp; None: over all of dp. Sums in two stages, so
    other bits."""
    rounding: str = "master"
    """How an update gets into 16-bit parameters. ``master``: there is a copy of them in fp32, 4 bytes more. Without
    one, for bfloat16: ``stochastic`` rounds by chance, ``kahan`` keeps what was rounded off in a second bfloat16, 2
    bytes more. ``optimizer.dtype = "bfloat16"`` halves the moments too, rounded by chance."""
    name: str = "zero0"

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes must be positive, got {self.bucket_bytes}")
        if self.shard_ranks is not None and self.shard_ranks < 1:
            raise ConfigError(f"shard_ranks must be a positive number of dp ranks, got {self.shard_ranks}")
        if self.activations not in ACTIVATIONS:
            raise ConfigError(f"activations {self.activations!r} is not one of {', '.join(ACTIVATIONS)}")
        if (self.activations == "budget") != (self.activation_bytes is not None):
            raise ConfigError(
                f"activations={self.activations!r} with activation_bytes={self.activation_bytes}: a budget, and only a "
                "budget, needs activation_bytes"
            )
        if self.activation_bytes is not None and self.activation_bytes < 1:
            raise ConfigError(f"activation_bytes must be positive, got {self.activation_bytes}")
        if self.optimizer.dtype == "float16":
            raise ConfigError(
                "optimizer.dtype = 'float16': squares of gradients are below its range; take bfloat16, or leave it out"
            )
        if self.rounding not in ROUNDINGS:
            raise ConfigError(f"rounding {self.rounding!r} is not one of {', '.join(ROUNDINGS)}")
        if self.rounding != "master" and self.params.dtype not in (None, "bfloat16"):
            raise ConfigError(
                f"rounding = {self.rounding!r} is for bfloat16 parameters, not for params.dtype = {self.params.dtype!r}"
            )
        if self.cadence not in CADENCES:
            raise ConfigError(f"cadence {self.cadence!r} is not one of {', '.join(CADENCES)}")
        if not isinstance(self.prefetch, int) or self.prefetch < 0:
            raise ConfigError(f"prefetch must be a whole number of computes, 0 or more, got {self.prefetch!r}")
        if not isinstance(self.persist, int) or self.persist < 0:
            raise ConfigError(f"persist must be a number of elements, 0 or more, got {self.persist!r}")
        if self.persist and not self.params.sharded:
            raise ConfigError(f"persist = {self.persist} is of sharded parameters: use zero3(), or leave it out")
        if self.grads.sharded and not self.optimizer.sharded:
            raise ConfigError("sharded gradients need a sharded optimizer: use zero2(), or shard both")
        if self.params.sharded and not self.grads.sharded:
            raise ConfigError("sharded parameters need sharded gradients: use zero3(), or shard both")

    def with_(self, **changes: object) -> Placement:
        return replace(self, **changes)  # type: ignore[arg-type]


def zero0() -> Placement:
    """Everything whole on every dp rank; gradients by reduce_scatter + all_gather."""
    return Placement(name="zero0")


def zero1() -> Placement:
    """Optimizer state sharded over dp (ZeRO stage 1, arXiv 1910.02054)."""
    return Placement(name="zero1", optimizer=State(sharded=True))


def zero2() -> Placement:
    """Optimizer state and gradients sharded; gradients are reduced after each microbatch."""
    return zero1().with_(name="zero2", grads=State(sharded=True), cadence="microbatch")


def zero3() -> Placement:
    """Everything sharded; parameters are gathered around their use."""
    return zero2().with_(name="zero3", params=State(sharded=True))


def hsdp(shard_ranks: int) -> Placement:
    """ZeRO stage 3 inside groups of ``shard_ranks`` dp ranks, replicas across them."""
    return zero3().with_(name="hsdp", shard_ranks=shard_ranks)


NAMED = {"zero0": zero0, "zero1": zero1, "zero2": zero2, "zero3": zero3}
