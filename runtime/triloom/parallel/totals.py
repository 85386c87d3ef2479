"""The few numbers all ranks must agree on: loss weight, loss, gradient norm. Handlers of WEIGH and CLIP.

The squared norm is summed in twice the precision of a double from blocks that no shard cuts, the
loss of the dp ranks is summed exactly: stage, bucket size, schedule and tier change who computes
which part, never a bit of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

import torch

from ..actions import Action
from ..groups.base import Group
from ..groups.objects import gather_objects
from ..scaling import Scaling, after, start
from .executor import Handler, StepState
from .norms import Clip, Pair
from .presence import agree_on_layout
from .sharded import ShardedState
from .views import owned_gradients, owned_runs

_NUMBERS = 5
"""Loss, its weight, the two parts of the norm, and the notices."""


class Totals:
    """Agreement of all ranks once a step, in one small all_gather: five numbers a rank, and a bit for each of its
    parameters, whether it has a gradient.

    world: every rank; dp: this rank's data-parallel group; weigh: loss weight of one microbatch's
    targets, None where the loss unit is not; counts: whether this rank's loss counts (tp rank 0 of
    the last stage); clip: the norm and its limit; scaling: loss scale and what becomes of a gradient that is
    not finite.
    """

    def __init__(
        self,
        *,
        world: Group,
        dp: Group,
        state: ShardedState,
        weigh: Callable[[Any], torch.Tensor] | None,
        counts: bool,
        clip: Clip,
        scaling: Scaling,
    ) -> None:
        self._world, self._dp, self._state = world, dp, state
        self._weigh, self._counts, self._clip = weigh, counts, clip
        self._rule = scaling
        self.scaling = start(scaling)
        self.notices: list[Callable[[], int]] = []
        """Asked in every step for bits that all ranks are to learn at its end, joined: that this rank was told to
        stop, that a save is not done. They cost nothing more."""
        self.renew()

    def renew(self) -> None:
        """The parameters of the state are other ones now, on some rank; collective over the world."""
        tie_of = {name: p.tie.index for name, p in self._state.params.items() if p.tie is not None}
        self._presence = agree_on_layout(self._world, self._state.coord, list(self._state.params), tie_of)
        self._runs = owned_runs(self._state)

    def handlers(self) -> dict[str, Handler]:
        return {"WEIGH": self._global_weight, "CLIP": self._norm_and_clip}

    def _global_weight(self, action: Action, step: StepState) -> None:
        """Global loss weight: the sum over microbatches and dp, known before the first backward."""
        self._weigh_locally(step)
        total = torch.tensor([sum(step.weights)], dtype=torch.float64)
        self._state.spent.wait("agree", self._dp.all_reduce(total))
        step.total_weight = float(total)
        step.loss_scale = self.scaling.scale / step.total_weight if step.total_weight else 0.0

    def _weigh_locally(self, step: StepState) -> None:
        step.weights = [] if self._weigh is None else [float(self._weigh(t)) for t in step.targets]

    def finish_evaluation(self, step: StepState) -> None:
        """Loss and weight of a forward-only program."""
        self._weigh_locally(step)
        self._agree(step, [], [False] * len(self._state.params))

    def _norm_and_clip(self, action: Action, step: StepState) -> None:
        self._state.wait_reduced()
        norm, pool = self._clip.norm, self._state.pool
        parts = [norm.part(grad, pool) for grad in self._runs]
        joined, absent = self._agree(step, parts, self._state.present())
        scaled = norm.finish(joined)
        step.scale = self.scaling.scale
        step.grad_norm = scaled / step.scale
        step.grad_scale = self._clip.factor(step.grad_norm) / step.scale
        step.skipped = not (math.isfinite(scaled) and math.isfinite(step.loss))
        self.scaling = after(self._rule, self.scaling, not step.skipped)
        if step.skipped:
            self._state.skip()
            self._skip(step)
        else:
            self._state.leave_out(absent)

    def _skip(self, step: StepState) -> None:
        """Say who had the first bad gradient; there may be too many in a row to go on."""
        mine = next((name for name, grad in owned_gradients(self._state) if not grad.isfinite().all()), None)
        names = gather_objects(self._world, mine)
        found = [(r, name) for r, name in enumerate(names) if name is not None]
        where = f"in {found[0][1]} on rank {self._world.members[found[0][0]]}" if found else "only in the sum"
        step.note = f"gradient norm {step.grad_norm} at step {step.step}, loss {step.loss}: first {where}"
        if self.scaling.skips > self._rule.max_skips:
            row = f"{self.scaling.skips} steps in a row (max_skips={self._rule.max_skips}) were skipped"
            step.diverged = f"{step.note}; {row}"

    def _agree(self, step: StepState, parts: Sequence[Pair], present: Sequence[bool]) -> tuple[Pair, frozenset[str]]:
        """Set the step's loss and weight on every rank; return all ranks' ``parts`` joined, and the parameters that
        are present nowhere."""
        numbers = torch.zeros(_NUMBERS, dtype=torch.float64)
        if self._counts:
            numbers[0] = sum(float(step.losses[mb]) for mb in sorted(step.losses))
            numbers[1] = sum(step.weights)
        join = self._clip.norm.join
        numbers[2], numbers[3] = join(parts)
        numbers[4] = reduce(or_, (ask() for ask in self.notices), 0)
        mine = torch.cat([numbers.view(torch.int64), self._presence.pack(present)])
        everyone = mine.new_empty(self._world.size, mine.numel())
        self._state.spent.wait("agree", self._world.all_gather(everyone, mine))
        floats = everyone[:, :_NUMBERS].contiguous().view(torch.float64)
        loss, step.total_weight = _exact_sum(floats[:, 0]), _exact_sum(floats[:, 1])
        step.loss = loss / step.total_weight if step.total_weight else 0.0
        pairs = [(high, low) for high, low in floats[:, 2:4].tolist()]
        step.notices = reduce(or_, map(int, floats[:, 4].tolist()))
        return join(pairs), self._presence.absent(everyone[:, _NUMBERS:])


def _exact_sum(values: torch.Tensor) -> float:
    """Correctly rounded, so in any order; NaN if a value is not finite."""
    return math.fsum(values.tolist()) if bool(values.isfinite().all()) else float("nan")
