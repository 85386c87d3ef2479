"""Which unit made the first number that is not finite: the forward of a batch again, looked at unit by unit.

Parameters are what they were in the step that went wrong, since a skipped step changes nothing. The pass runs in
evaluation mode, so that buffers stay as they are; costs one forward, and one more look at every activation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .errors import DivergedError
from .groups.fingerprint import rank_list
from .groups.objects import gather_objects
from .parallel.views import owned_gradients

if TYPE_CHECKING:
    from .engine import Engine


class Finding(NamedTuple):
    """The first unit of a rank whose output was not finite. Ordered as the forward is."""

    microbatch: int
    unit: int
    cause: str
    """A key of WAY_OUT."""
    what: str


WAY_OUT: Mapping[str, str] = {
    "input": "look at the data of that step",
    "weights": "a step before made them so: go on from a checkpoint before it, with a lower learning rate",
    "output": "its computation left the range of its dtype: lower the learning rate, or train in a wider dtype",
    "backward": "its gradient left the range of its dtype: lower the learning rate, or train in a wider dtype",
    "sum": "only the sum is too large: lower the learning rate, or the loss",
}
"""Cause -> what to do about it."""


def explained(engine: Engine, said: str, inputs: Any, targets: Any) -> DivergedError:
    """The error that ends a training, the same on every rank; collective. said: what is known already."""
    bad = _bad_gradients(engine)
    found = first_not_finite(engine, inputs, targets)
    where, cause = found if found is not None else bad
    return DivergedError(f"{said}. First not finite: {where}. What to do: {WAY_OUT[cause]}")


def first_not_finite(engine: Engine, inputs: Any, targets: Any) -> tuple[str, str] | None:
    """Where the forward of a batch is not finite first, and why; None if it is finite. Collective, as a step is."""
    findings: list[Finding] = []
    with _watching(engine, findings):
        engine.evaluate(inputs, targets)
    everyone = gather_objects(engine.world, min(findings, default=None))
    found = {rank: Finding(*one) for rank, one in enumerate(everyone) if one is not None}
    if not found:
        return None
    first = min(found.values(), key=lambda f: (f.microbatch, f.unit, list(WAY_OUT).index(f.cause)))
    same = [r for r, f in found.items() if f[:2] == first[:2] and f.cause == first.cause]
    name = list(engine.named)[first.unit]
    at = f"unit {name!r}, microbatch {first.microbatch}, on {rank_list(same, engine.world.members)}"
    return f"{first.what} of {at}", first.cause


@contextmanager
def _watching(engine: Engine, findings: list[Finding]) -> Iterator[None]:
    """Look at every unit's forward while inside."""
    names = list(engine.named)

    def look(unit: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _finite(output):
            return
        bad = [n for n, p in module.named_parameters() if not _finite(p)]
        if not _finite(args[:1]):
            cause, what = "input", "the input"
        elif bad:
            cause, what = "weights", f"the weights {names[unit]}.{bad[0]}"
        else:
            cause, what = "output", "the output, though input and weights are finite,"
        findings.append(Finding(engine.scope.microbatch, unit, cause, what))

    def hook(unit: int) -> Any:
        return lambda module, args, output: look(unit, module, args, output)

    hooks = [module.register_forward_hook(hook(unit)) for unit, module in engine.modules.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _finite(tree: Any) -> bool:
    tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return all(bool(t.isfinite().all()) for t in tensors)


def _bad_gradients(engine: Engine) -> tuple[str, str]:
    """The last unit of the model with a gradient that is not finite: a backward comes to it first."""
    units = {name: p.unit for name, p in engine.state.params.items()}
    mine = [[units[name], name] for name, grad in owned_gradients(engine.state) if not _finite(grad)]
    everyone: Sequence[Any] = gather_objects(engine.world, max(mine, default=None))
    found = {rank: one for rank, one in enumerate(everyone) if one is not None}
    if not found:
        return "no gradient by itself", "sum"
    unit, name = max(found.values())
    same = [rank for rank, one in found.items() if one == [unit, name]]
    ranks = rank_list(same, engine.world.members)
    later = f"unit {list(engine.named)[unit]!r} (those of later units are finite)"
    return f"the gradient of {name}, of {later}, on {ranks}", "backward"
