"""Loss scaling and what to do about a step whose gradient is not finite. Pure.

fp16 gradients underflow: the loss is multiplied by a scale before the backward and the gradient divided by it
after (Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.2). The scale falls when
a gradient overflows and grows again after a while without.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The rule. Factors are powers of two, so that scaling changes no bit of a gradient that does not over- or
    underflow."""

    initial: float = 1.0
    backoff: float = 1.0
    """Factor after a step that was skipped."""
    growth: float = 1.0
    """Factor after ``interval`` steps without a skip."""
    interval: int = 2000
    smallest: float = 1.0
    largest: float = 2.0**24
    max_skips: int = 10
    """So many skipped steps in a row are allowed; one more ends the training. 0: the first one does."""

    def __post_init__(self) -> None:
        if not 0 < self.backoff <= 1 or self.growth < 1:
            raise ConfigError(f"backoff must lie in (0, 1] and growth be at least 1, got {self.backoff}, {self.growth}")
        if not 0 < self.smallest <= self.initial <= self.largest:
            raise ConfigError(
                f"scales must satisfy 0 < smallest <= initial <= largest, got {self.smallest}, {self.initial}, "
                f"{self.largest}"
            )
        if self.interval < 1 or self.max_skips < 0:
            raise ConfigError(f"interval must be positive and max_skips >= 0, got {self.interval}, {self.max_skips}")


def fixed(max_skips: int = 10) -> Scaling:
    """No scaling: fp32, fp64 and bf16 have the range."""
    return Scaling(max_skips=max_skips)


def dynamic(initial: float = 2.0**16, interval: int = 2000, max_skips: int = 10) -> Scaling:
    """The usual rule for fp16: halve on overflow, double after ``interval`` good steps."""
    return Scaling(initial=initial, backoff=0.5, growth=2.0, interval=interval, max_skips=max_skips)


@dataclass(frozen=True)
class ScalingState:
    """Where the rule stands; part of what a resumed run needs."""

    scale: float
    good: int = 0
    """Steps since the last change of the scale."""
    skips: int = 0
    """Skipped steps in a row."""


def start(rule: Scaling) -> ScalingState:
    return ScalingState(rule.initial)


def after(rule: Scaling, state: ScalingState, finite: bool) -> ScalingState:
    """The state after a step whose gradient was finite or not."""
    if not finite:
        return ScalingState(max(rule.smallest, state.scale * rule.backoff), 0, state.skips + 1)
    if state.good + 1 < rule.interval:
        return replace(state, good=state.good + 1, skips=0)
    return ScalingState(min(rule.largest, state.scale * rule.growth))
