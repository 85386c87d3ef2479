"""The few numbers all ranks must agree on: loss weight, loss, gradient norm. Handlers of WEIGH and CLIP.

The squared norm is summed in twice the precision of a double from blocks that no shard cuts, the
loss of the dp ranks is summed exactly: stage, bucket size, schedule and tier change who computes
which part, never a bit of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import native
from ..actions import Action
from ..errors import DivergedError
from ..groups.base import Group
from .executor import Handler, StepState
from .sharded import ShardedState


class Totals:
    """Agreement of all ranks once a step, in one small all_gather of four numbers a rank.

    world: every rank; dp: this rank's data-parallel group; weigh: loss weight of one microbatch's
    targets, None where the loss unit is not; counts: whether this rank's loss counts (tp rank 0 of
    the last stage); clip: largest allowed norm or None.
    """

    def __init__(
        self,
        *,
        world: Group,
        dp: Group,
        state: ShardedState,
        weigh: Callable[[Any], torch.Tensor] | None,
        counts: bool,
        clip: float | None,
    ) -> None:
        self._world, self._dp, self._state = world, dp, state
        self._weigh, self._counts, self._clip = weigh, counts, clip

    def handlers(self) -> dict[str, Handler]:
        return {"WEIGH": self._global_weight, "CLIP": self._norm_and_clip}

    def _global_weight(self, action: Action, step: StepState) -> None:
        """Global loss weight: the sum over microbatches and dp, known before the first backward."""
        self._weigh_locally(step)
        total = torch.tensor([sum(step.weights)], dtype=torch.float64)
        self._dp.all_reduce(total).wait()
        step.total_weight = float(total)
        step.loss_scale = 1.0 / step.total_weight if step.total_weight else 0.0

    def _weigh_locally(self, step: StepState) -> None:
        step.weights = [] if self._weigh is None else [float(self._weigh(t)) for t in step.targets]

    def finish_evaluation(self, step: StepState) -> None:
        """Loss and weight of a forward-only program."""
        self._weigh_locally(step)
        self._agree(step, ())

    def _norm_and_clip(self, action: Action, step: StepState) -> None:
        self._state.wait_reduced()
        pool = self._state.pool
        parts = [x for piece in self._state.owned_gradients() for x in native.sum_squares_wide(piece, pool=pool)]
        step.grad_norm = math.sqrt(self._agree(step, parts))
        if not math.isfinite(step.grad_norm):
            raise DivergedError(
                f"the gradient norm is {step.grad_norm} at step {step.step} (loss {step.loss}): no weight was changed; "
                "lower the learning rate, check the data, or train in a wider dtype"
            )
        if self._clip is not None:
            step.grad_scale = min(1.0, self._clip / (step.grad_norm + 1e-6))

    def _agree(self, step: StepState, parts: Sequence[float]) -> float:
        """Set the step's loss and weight on every rank; return the sum of all ranks' ``parts``."""
        mine = torch.zeros(4, dtype=torch.float64)
        if self._counts:
            mine[0] = sum(float(step.losses[mb]) for mb in sorted(step.losses))
            mine[1] = sum(step.weights)
        mine[2], mine[3] = native.wide_sum(torch.tensor(parts, dtype=torch.float64))
        everyone = mine.new_empty(self._world.size, 4)
        self._world.all_gather(everyone, mine).wait()
        loss, step.total_weight = _exact_sum(everyone[:, 0]), _exact_sum(everyone[:, 1])
        step.loss = loss / step.total_weight if step.total_weight else 0.0
        return _exact_sum(everyone[:, 2:].flatten())


def _exact_sum(values: torch.Tensor) -> float:
    """Correctly rounded, so in any order; NaN if a value is not finite."""
    return math.fsum(values.tolist()) if bool(values.isfinite().all()) else float("nan")
