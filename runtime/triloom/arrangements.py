"""The second run of a verification, what the two may differ in, and which tolerance that makes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace

import torch

from .compare import Tolerance
from .config import Config
from .config.schema import ParallelConfig, PlacementConfig, ScheduleConfig
from .config.show import plain
from .errors import ConfigError
from .plan import Plan

FREE = ("parallel", "schedule", "placement")
"""Sections in which two runs of the same training may differ."""
BESIDE = ("run", "log", "check")
"""Sections that say nothing about the numbers."""

BITWISE = frozenset(
    {"parallel.dp"}
    | {f"schedule.{name}" for name in ("kind", "file", "measured", "memory")}
    | {f"placement.{name}" for name in ("name", "bucket_mb", "prefetch", "keep", "persist")}
    | {f"placement.{name}" for name in ("activations", "activation_mb")}
)
"""Keys that change no bit on the same mesh, with the same microbatches and the same cadence. (Equal meshes have
equal dp, whether it was given or left open.)"""

SHARES: Mapping[str, tuple[float, float, float]] = {
    "float64": (1e-10, 1e-8, 1e-6),
    "float32": (1e-5, 1e-3, 0.1),
    "float16": (2e-3, 2e-2, 0.2),
    "bfloat16": (1e-2, 0.1, 0.5),
}
"""Precision of the coarsest numbers -> tolerances of loss, gradients and weights (``compare.Tolerance``). Seen on
small decoders: a thousandth of the first two of float64 and float32, a tenth of bfloat16's."""
QUANTISED = (1e-3, 0.0, 0.1)
"""No less than this where an optimizer rounds its states, which then tip from one step of their scale to the next."""


def alone(plan: Plan) -> Config:
    """The same training on one rank, microbatch by microbatch, with everything whole and kept."""
    config = plan.config
    return replace(
        config,
        parallel=ParallelConfig(dp=1),
        schedule=ScheduleConfig(microbatches=plan.microbatches * plan.dp),
        placement=PlacementConfig(
            name="zero0",
            grad_dtype=config.placement.grad_dtype,
            state_dtype=config.placement.state_dtype,
            rounding=config.placement.rounding,
        ),
    )


def in_float64(config: Config) -> Config:
    """The same training with every number in fp64, but for what an optimizer keeps in 8 bits."""
    return replace(
        config,
        train=replace(config.train, dtype="float64"),
        placement=replace(config.placement, grad_dtype=None, state_dtype=None, rounding="master"),
    )


def differing(one: Plan, two: Plan) -> dict[str, tuple[str, str]]:
    """Keys in which two resolved configurations differ, with both values; sections that change no number left out.

    ``placement.cadence`` is the one in force, which a stage may imply.
    """
    left, right = (_flat(plan) for plan in (one, two))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def _flat(plan: Plan) -> dict[str, str]:
    sections = asdict(plan.config)
    out = {
        f"{f.name}.{key}": plain(value)
        for f in fields(Config)
        if f.name not in BESIDE
        for key, value in sections[f.name].items()
    }
    return out | {"placement.cadence": plan.placement.cadence, "mesh": str(plan.mesh)}


def check_pair(one: Plan, two: Plan) -> dict[str, tuple[str, str]]:
    """What two runs differ in. Raises ConfigError if they are not the same training, or are so on purpose."""
    found = differing(one, two)
    other = [key for key in found if key != "mesh" and key.partition(".")[0] not in FREE]
    if other:
        said = ", ".join(f"{key} = {found[key][0]} and {found[key][1]}" for key in other)
        raise ConfigError(f"the two runs are not the same training: {said}; let them differ in {', '.join(FREE)} only")
    for plan in (one, two):
        reduction = plan.config.placement.reduction
        if found and reduction != "exact":
            raise ConfigError(
                f"placement.reduction = {reduction} changes the gradient on purpose, so there is nothing to hold it "
                "against; verify with placement.reduction = exact"
            )
    return found


def is_bitwise(found: Mapping[str, tuple[str, str]]) -> bool:
    return set(found) <= BITWISE


def tolerance(one: Plan, found: Mapping[str, tuple[str, str]]) -> Tolerance:
    """What must be equal of two runs that differ in ``found``."""
    config = one.config
    used = {config.train.dtype, config.placement.grad_dtype or config.train.dtype}
    coarsest = max(used, key=lambda name: float(torch.finfo(getattr(torch, name)).eps))
    eps = float(torch.finfo(getattr(torch, coarsest)).eps)
    if is_bitwise(found):
        what = f"on the same mesh only {', '.join(found)} changes" if found else "it is the same run twice"
        return Tolerance(0.0, 0.0, 0.0, eps, what)
    shares = SHARES[coarsest]
    why = f"sums are added in another order in {coarsest}, since {', '.join(found)} differ"
    if config.optim.kind == "adamw8bit" or config.placement.state_dtype is not None:
        shares = tuple(map(max, shares, QUANTISED))  # type: ignore[assignment]
        why += ", and the optimizer rounds its averages"
    return Tolerance(*shares, eps, why)
