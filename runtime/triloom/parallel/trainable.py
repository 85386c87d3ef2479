"""Parameters that are frozen or trained from a step on: noticed, and given state of their own.

What is frozen when the engine is built has no gradient, no moments and no place in the layout. A parameter that is
trained later gets a bucket; it has missed the steps before, as one that torch's optimizer found without a gradient. One
that is frozen later keeps its place and its state, and is left alone until it is trained again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..errors import TriloomError
from .bucket import BucketState
from .build import Collector, UnitLike
from .executor import UnitRun
from .sharded import ShardedState
from .weight_grads import UnitGrads


class Watch:
    """Tells whether a parameter's ``requires_grad`` was changed.

    named: all units; modules: those of this rank. alone: no other rank runs other units.
    """

    def __init__(self, named: Mapping[str, UnitLike], modules: Iterable[nn.Module], alone: bool) -> None:
        given = [u for u in named.values() if isinstance(u, nn.Module)]
        unique = {id(p): p for m in (*given, *modules) for p in m.parameters()}
        self._params = list(unique.values())
        self._everything = alone or len(given) == len(named)
        self._flags = self._now()

    def _now(self) -> list[bool]:
        with torch._C.DisableTorchFunctionSubclass():
            return [p.requires_grad for p in self._params]

    def changed(self) -> bool:
        """Since the last :meth:`settle`; about 50 ns a parameter. Raises TriloomError where other ranks, which
        have other units, cannot notice as well."""
        if self._now() == self._flags:
            return False
        if not self._everything:
            raise TriloomError(
                "requires_grad of a parameter was changed, which the ranks of other pipeline stages do not see: "
                "call engine.refresh() on every rank after changing it"
            )
        return True

    def settle(self) -> None:
        """What is there now is known."""
        self._flags = self._now()


def unit_runs(modules: Mapping[int, nn.Module], state: ShardedState, last: int) -> dict[int, UnitRun]:
    """The units of a rank for the executor. last: number of the loss."""
    trained = {u: [p for p in m.parameters() if p.requires_grad] for u, m in modules.items()}
    return {
        u: UnitRun(
            index=u,
            module=m,
            params=trained[u],
            grads=UnitGrads({id(p): state.uses[u, id(p)] for p in trained[u]}),
            is_loss=u == last,
        )
        for u, m in modules.items()
    }


def retrain(units: Mapping[int, UnitRun], collector: Collector, state: ShardedState, steps: int) -> list[BucketState]:
    """State for what is trained now and was not before ``steps``; the new buckets. Own units only, no communication."""
    for u, unit in sorted(units.items()):
        new = [p for p in collector.add(u, unit.module) if (u, id(p.param)) not in state.uses]
        state.missed |= {p.name: steps for p in new if p.name not in state.params and steps}
        state.add(new)
    buckets = state.finish()
    for u, unit in units.items():
        unit.params[:] = [p for p in unit.module.parameters() if p.requires_grad]
        unit.grads.uses.update({id(p): state.uses[u, id(p)] for p in unit.params})
    return buckets
