"""Recomputation: of a whole unit (a forward that keeps only its input, and a second that makes the graph), and of a
function inside one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import TriloomError
from ..scope import Scope
from . import cut
from .cut import Boundary, Pass


@dataclass(frozen=True, slots=True)
class Kept:
    """The input of a unit, and the versions its tensors had."""

    x: Boundary
    versions: tuple[int, ...]
    flags: tuple[bool, ...]
    """Which outputs were announced to carry a gradient."""
    draws: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """State of torch's own generators at the first forward, if the unit draws from them."""


class Keeper:
    """Runs the two forwards of one unit. Remembers what its first run showed: whether it changes its input in
    place, and whether it draws from torch's own generators (own layers draw by counters)."""

    def __init__(self) -> None:
        self._changes_input: bool | None = None
        self._draws: bool | None = None

    def forward(self, unit: nn.Module, x: Boundary, has_params: bool, *extra: Any) -> tuple[Boundary, Kept]:
        """The forward without a graph. A unit that changes its input gets a copy, found out at its first run.

        Without a graph nobody knows which outputs will carry a gradient: every floating-point output does,
        if an input or a parameter has one.
        """
        given = _copy(x) if self._changes_input in (None, True) else x
        before = _versions(given)
        draws = {} if self._draws is False else _generators(given)
        with torch.no_grad():
            out = cut.boundary(unit(given.tree(), *extra))
        if self._draws is None:
            after = _generators(given)
            self._draws = any(not torch.equal(state, after[d]) for d, state in draws.items())
        if self._changes_input is None:
            self._changes_input = _versions(given) != before
        differentiable = has_params or any(x.needs_grad)
        flags = tuple(differentiable and isinstance(y, torch.Tensor) and y.is_floating_point() for y in out.leaves)
        return Boundary(out.leaves, out.spec, flags), Kept(x, _versions(x), flags, draws if self._draws else {})

    def run(
        self, unit: nn.Module, x: Boundary, *extra: Any, inside: AbstractContextManager[Any] | None = None
    ) -> tuple[Boundary, Pass]:
        """The only forward of a unit that is not recomputed. inside: around the unit."""
        before = _versions(x) if self._changes_input is None else ()
        try:
            out = cut.forward(unit, x, *extra, inside=inside, in_place=self._changes_input is not False)
        except RuntimeError as error:
            if self._changes_input is False and "leaf Variable that requires grad" in str(error):
                raise TriloomError(
                    f"a unit ({type(unit).__name__}) changes its input in place now and did not in its first run: let "
                    "it change a copy"
                ) from error
            raise
        if self._changes_input is None:
            self._changes_input = _versions(x) != before
        return out

    def again(
        self, unit: nn.Module, kept: Kept, *extra: Any, inside: AbstractContextManager[Any] | None = None
    ) -> tuple[Boundary, Pass]:
        """The forward with a graph, on the kept input. inside: around the unit."""
        if _versions(kept.x) != kept.versions:
            raise TriloomError(
                "the input of a recomputed unit was changed in place after its forward: change a copy, or do not "
                "recompute the unit"
            )
        with _statistics_once(unit), _drawing(kept.draws):
            x = _copy(kept.x) if self._changes_input else kept.x
            out, record = cut.forward(unit, x, *extra, inside=inside, in_place=bool(self._changes_input))
        outputs = iter(record.outputs)
        made = [next(outputs) if now else None for now in out.needs_grad]
        return out, Pass(record.inputs, [y for y, said in zip(made, kept.flags, strict=True) if said])


def _copy(x: Boundary) -> Boundary:
    return Boundary([v.clone() if isinstance(v, torch.Tensor) else v for v in x.leaves], x.spec, x.needs_grad)


def _versions(x: Boundary) -> tuple[int, ...]:
    return tuple(t._version for t in x.tensors())


@contextmanager
def _statistics_once(unit: nn.Module) -> Iterator[None]:
    """Batch norms normalise as in the first forward but do not move their running statistics again."""
    norms = [m for m in unit.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m, (_, batches) in zip(norms, before, strict=True):
        m.momentum = 0.0  # new = 1 * old + 0 * batch
        m.num_batches_tracked = None if batches is None else batches.clone()
    try:
        yield
    finally:
        for m, (momentum, batches) in zip(norms, before, strict=True):
            m.momentum, m.num_batches_tracked = momentum, batches


def recompute(fn: Callable[..., Any], *args: Any, scope: Scope | None = None, draws: bool = True) -> Any:
    """``fn(*args)`` inside a unit's forward, which keeps ``args`` and computes the rest again in the backward.

    The same bits as ``fn(*args)``, with any schedule and with weight gradients deferred: what is recomputed are the
    saved tensors, the graph stays the first one. scope: of the layers that ``fn`` calls, so that their dropout
    repeats (layers without one need none). draws: whether torch's own generators are put back for the second
    run; False where ``fn`` does not draw from them saves 20 us. Batch norms of ``fn``, a module or a method of one,
    do not move their statistics twice.

    Raises RuntimeError in the backward if a tensor of ``args`` was changed in place since.
    """
    module = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    then = {} if scope is None else {name: getattr(scope, name) for name in _PLACE}

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            if isinstance(module, nn.Module):
                stack.enter_context(_statistics_once(module))
            if scope is not None:
                stack.enter_context(_placed(scope, then))
            yield

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), again()

    return checkpoint(fn, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts)


_PLACE = ("step", "microbatch", "sample0", "unit", "grads")
"""What the executor moves in a Scope from forward to forward."""


@contextmanager
def _placed(scope: Scope, values: Mapping[str, Any]) -> Iterator[None]:
    """The scope as it was, inside the ``with``."""
    now = {name: getattr(scope, name) for name in values}
    for name, value in values.items():
        setattr(scope, name, value)
    try:
        yield
    finally:
        for name, value in now.items():
            setattr(scope, name, value)


def _generators(x: Boundary) -> dict[str, torch.Tensor]:
    """States of torch's own generators of the host and of the GPUs of ``x``."""
    out = {"cpu": torch.get_rng_state()}
    for device in sorted({str(t.device) for t in x.tensors() if t.is_cuda}):
        out[device] = torch.cuda.get_rng_state(device)
    return out


def _set_generators(states: Mapping[str, torch.Tensor]) -> None:
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def _drawing(states: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Torch's own generators as they were, inside the ``with``."""
    now = {d: torch.get_rng_state() if d == "cpu" else torch.cuda.get_rng_state(d) for d in states}
    _set_generators(states)
    try:
        yield
    finally:
        _set_generators(now)
