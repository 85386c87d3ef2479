"""A budget of activations that cannot be reached is refused before the first step, where shapes alone can prove it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from .budget import BudgetError
from .errors import ConfigError
from .estimate import estimate
from .parallel.build import LOSS
from .together import together
from .tracing import Run

if TYPE_CHECKING:
    from .engine import Engine


def refuse_budget(engine: Engine, inputs: Any, targets: Any) -> None:
    """Raise SetupError on every rank if the units, traced without memory, cannot be recomputed into the budget.

    Collective. Nothing is refused that shapes do not prove: units that are modules already, or that look at values,
    are measured in the first step. Traces the whole model once on rank 0.
    """
    leaves = pytree.tree_leaves((inputs, targets))
    known = engine.world.rank == 0 and all(isinstance(x, torch.Tensor) for x in leaves)
    together(engine.world, lambda: _trace(engine, inputs, targets) if known else None)


def _trace(engine: Engine, inputs: Any, targets: Any) -> None:
    named = dict(engine.named)
    loss = named.pop(LOSS)
    shapes = (pytree.tree_map(lambda x: (tuple(x.shape), x.dtype), tree) for tree in (inputs, targets))
    run = Run(
        units=named,
        loss=loss,
        mesh=engine.mesh,
        order=engine.order,
        optimizer=engine.optimizer,
        placement=engine.placement,
        inputs=next(shapes),
        targets=next(shapes),
        ties=[tie.names for tie in engine.ties],
        stages=[len(units) for units in engine.stage_units],
        sequence_parallel=engine.scope.sequence_parallel,
        dtype=engine.scope.dtype,
        device=str(engine.scope.device),
    )
    try:
        estimate(run)
    except BudgetError:
        raise
    except ConfigError:
        return
