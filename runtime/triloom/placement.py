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
    name: str = "zero0"

    def __post_init__(self) -> None:
        if self.bucket_bytes < 1:
            raise ConfigError(f"bucket_bytes must be positive, got {self.bucket_bytes}")
        if self.grads.sharded and not self.optimizer.sharded:
            raise ConfigError("sharded gradients need a sharded optimizer: use zero1(), or shard both")
        if self.params.sharded or self.grads.sharded:
            raise ConfigError("sharded parameters and gradients are not available yet: use zero0() or zero1()")

    def with_(self, **changes: object) -> Placement:
        return replace(self, **changes)  # type: ignore[arg-type]


def zero0() -> Placement:
    """Everything whole on every dp rank; gradients by reduce_scatter + all_gather."""
    return Placement(name="zero0")


def zero1() -> Placement:
    """Optimizer state sharded over dp (ZeRO stage 1, arXiv 1910.02054)."""
    return Placement(name="zero1", optimizer=State(sharded=True))


NAMED = {"zero0": zero0, "zero1": zero1}
