"""The pass that moves recomputation into idle time: a rank that waits for a gradient recomputes meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from ..actions import Action, Program, replace_ranks
from ..errors import ProgramError
from ..schedules import NAMED, Schedule
from ..simulate import Costs, Span, Timeline, simulate
from .communication import add_communication
from .layout import StateLayout
from .lowering import lower
from .recompute import add_recompute

BLOCK = Costs(kept=1.0, held=17.0)
"""Of a transformer block, in units of its input: 2 sbh bytes go in and 34 sbh are saved (arXiv 2205.05198, 4.1)."""
_TINY = 1e-9
"""What rounding may make of sums of times and sizes."""
_ROUNDS = 16
"""Moving some Rs opens gaps for others; most programs are settled after a few rounds."""


def early_recompute(
    program: Program, layout: StateLayout, costs: Costs = BLOCK, memory: float | None = None
) -> Program:
    """The program with units' Rs moved back into gaps that they fit into, if a rank then ends sooner and none later.

    An R beside its backward is cut into units of which one is recomputed at a time, in turn with the backward: least
    memory, but the backward waits for its gradient with one unit recomputed only. Here further units are recomputed
    while a rank waits, as far as memory allows.

    program: computes of stages and transfers, an R before each backward (``add_recompute``, ``add_communication``, in
    this order); add_state comes after. costs: of the simulator, ``kept`` and ``held`` in one unit of memory. memory:
    what the activations of a rank may take at most, by those sizes; the peak without any move if left out.

    Only R moves, so results are the same bits. O(rounds x actions), and one simulation a round.
    """
    if any(a.subject.kind == "unit" for row in program.ranks for a in row):
        raise ProgramError(
            "early_recompute takes computes of stages: run it before the passes that cut them into units"
        )
    rows = [lower(row, layout, lambda i, a: a.op == "R") for row in program.ranks]
    first = best = simulate(replace_ranks(program, rows), costs, layout=layout)
    sizes = _Sizes(first.program, layout, costs)
    limits = [max(sizes.levels(row)) if memory is None else memory for row in first.program.ranks]
    for _ in range(_ROUNDS):
        rows = [_fill(spans, sizes, limit) for spans, limit in zip(best.ranks, limits, strict=True)]
        moved = simulate(replace_ranks(program, rows), costs, layout=layout)
        if moved.program == best.program or _any_later(moved, best):
            break
        best = moved
    return best.program if _any_later(first, best) else first.program


def in_bubbles(
    schedule: str | Schedule, stages: Sequence[int], costs: Costs = BLOCK, memory: float | None = None
) -> Schedule:
    """The schedule with recomputation in its bubbles, for a placement that recomputes; see :func:`early_recompute`.

    stages: number of units of each stage, the loss included, as the Engine's.
    """
    make = NAMED[schedule] if isinstance(schedule, str) else schedule
    ends = list(accumulate(stages, initial=0))
    layout = StateLayout(tuple(tuple(range(a, b)) for a, b in pairwise(ends)), ())

    def scheduled(ranks: int, microbatches: int) -> Program:
        return early_recompute(add_communication(add_recompute(make(ranks, microbatches))), layout, costs, memory)

    return scheduled


def _any_later(one: Timeline, other: Timeline) -> bool:
    """Whether some rank ends later in ``one``."""
    return any(a > b + _TINY * other.makespan for a, b in zip(one.end, other.end, strict=True))


class _Sizes:
    """How much memory an action takes (or gives back): a stage's sizes divided evenly among its units."""

    def __init__(self, program: Program, layout: StateLayout, costs: Costs) -> None:
        self.layout = layout
        self.stage_of = {u: s for s, units in enumerate(layout.units) for u in units}
        held, deferred = costs.memory(program.stages)
        kept = costs.kept_by_stage(program.stages)
        self.change = {
            "F": kept,
            "R": [h - k for h, k in zip(held, kept, strict=True)],
            "BW": [-h for h in held],
            "B": [d - h for d, h in zip(deferred, held, strict=True)],
            "W": [-d for d in deferred],
        }

    def stage(self, action: Action) -> int:
        index = action.subject.index or 0
        return index if action.subject.kind == "stage" else self.stage_of[index]

    def of(self, action: Action) -> float:
        if action.op not in self.change:
            return 0.0
        stage = self.stage(action)
        return self.change[action.op][stage] * len(self.layout.units_of(action)) / len(self.layout.units[stage])

    def levels(self, row: Sequence[Action]) -> list[float]:
        """Memory after each action."""
        return list(accumulate(map(self.of, row)))


def _fill(spans: Sequence[Span], sizes: _Sizes, limit: float) -> list[Action]:
    """One rank's row, with Rs moved back to the nearest gap that they fit into, in time and in memory."""
    row = [span.action for span in spans]
    gaps = [0.0, *(max(0.0, after.begin - before.end) for before, after in pairwise(spans))]
    levels = sizes.levels(row)
    target: dict[int, int] = {}
    for j, action in enumerate(row):
        if action.op == "R" and (place := _gap(j, spans, gaps, levels, sizes, limit)) is not None:
            target[j] = place
    moved: dict[int, list[Action]] = {}
    for j, place in target.items():
        moved.setdefault(place, []).append(row[j])
    return [a for i, action in enumerate(row) for a in (*moved.get(i, ()), *(() if i in target else (action,)))]


def _gap(
    j: int, spans: Sequence[Span], gaps: list[float], levels: list[float], sizes: _Sizes, limit: float
) -> int | None:
    """The place before which the R at ``j`` goes; its time is taken from the gap there, its memory from there on."""
    action, seconds, more = spans[j].action, spans[j].end - spans[j].begin, sizes.of(spans[j].action)
    for i in range(j - 1, 0, -1):
        before = spans[i].action
        made = before.op == "F" and before.microbatch == action.microbatch
        if levels[i] + more > limit * (1 + _TINY) or (made and sizes.stage(before) == sizes.stage(action)):
            return None
        if seconds > 0.0 and gaps[i] >= seconds * (1 - _TINY) and levels[i - 1] + more <= limit * (1 + _TINY):
            gaps[i] -= seconds
            for k in range(i - 1, j):
                levels[k] += more
            return i
    return None
