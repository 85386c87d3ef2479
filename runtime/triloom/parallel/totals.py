"""The few numbers all ranks must agree on: loss weight, loss, gradient norm. Handlers of WEIGH and CLIP.

Each is combined from partial values in an order that depends on the model and the mesh only: loss
by dp rank, the squared norm by parameter in global order and by dp piece. Stage, schedule and tier
change who computes a partial value, never the order in which they are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import native
from ..actions import Action
from ..errors import TriloomError
from ..groups.base import Group
from ..groups.objects import gather_objects
from .executor import Handler, StepState
from .sharded import ShardedState

SUM_SQUARES: dict[str, Callable[[torch.Tensor], float]] = {
    "cpu": native.sum_squares,
    "cuda": lambda t: float(t.double().square().sum()),
}


class Totals:
    """Agreement of all ranks once a step, in one small all_gather.

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
        tp_rank: int,
    ) -> None:
        self._world, self._dp, self._state = world, dp, state
        self._weigh, self._counts, self._clip = weigh, counts, clip
        position = {name: i for i, name in enumerate(state.params)}
        mine = [
            (piece.slot.unit, position[piece.slot.name], tp_rank, dp.rank, piece.start)
            for piece, _ in state.owned_pieces()
        ]
        keys = gather_objects(world, mine)
        self._width = 2 + max(map(len, keys))
        placed = [(tuple(key), rank, i) for rank, row in enumerate(keys) for i, key in enumerate(row)]
        self._order = torch.tensor(
            [rank * self._width + 2 + i for _, rank, i in sorted(placed)], dtype=torch.int64
        )

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
        self.agree(step)

    def _norm_and_clip(self, action: Action, step: StepState) -> None:
        self._state.wait_reduced()
        partials = [SUM_SQUARES[g.device.type](g) for _, g in self._state.owned_pieces()]
        squares = self.agree(step, partials)[self._order]
        step.grad_norm = math.sqrt(math.fsum(squares.tolist()))
        if not math.isfinite(step.grad_norm):
            raise TriloomError(
                f"the gradient norm is {step.grad_norm} at step {step.step} (loss {step.loss}): no weight was changed; "
                "lower the learning rate, check the data, or train in a wider dtype"
            )
        if self._clip is not None:
            step.grad_scale = min(1.0, self._clip / (step.grad_norm + 1e-6))

    def agree(self, step: StepState, partials: Sequence[float] = ()) -> torch.Tensor:
        """Exchange partial values; sets the step's loss and weight on every rank; returns all values, flat."""
        mine = torch.zeros(self._width, dtype=torch.float64)
        if self._counts:
            mine[0] = sum(float(step.losses[mb]) for mb in sorted(step.losses))
            mine[1] = sum(step.weights)
        mine[2 : 2 + len(partials)] = torch.tensor(partials, dtype=torch.float64)
        everyone = mine.new_empty(self._world.size * self._width)
        self._world.all_gather(everyone, mine).wait()
        rows = everyone.view(self._world.size, self._width)
        loss, weight = (math.fsum(rows[:, i].tolist()) for i in (0, 1))
        step.total_weight = weight
        step.loss = loss / weight if weight else 0.0
        return everyone
