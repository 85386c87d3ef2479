"""The automatic schedule: the shortest program found for given costs and memory. Pure, and repeatable.

Where it looks, in this order, on one stage a rank and (where the costs fit) on several:

1. every named schedule that fits the memory, as it is;
2. their forwards and backwards in the same order with the Ws woven in anew (see ``weave``);
3. 1F1B orders over a family of warm-ups, from one microbatch a rank to what the memory holds;
4. building blocks of the true costs, repeated (arXiv 2405.15362): one microbatch's way through the
   stages at several speeds, and the next one's a period later; the slower, the more memory;
5. small changes to the best order so far: one more or one less forward ahead of the backwards of a
   rank or of all ranks from one on, and a forward and a backward that change places.

The effort is counted in actions, not in seconds, so that every rank finds the same program.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

from ..actions import Program
from ..errors import ConfigError
from ..schedules import NAMED, Schedule
from ..schedules.base import chain
from ..simulate import Costs, Timeline, simulate
from .bound import lower_bound
from .weave import Loom, Order, Woven

Limit = float | Sequence[float] | None

PATIENCE = (1.0, 0.5, 0.0)
"""Parts of a W that a wait must hold before it is used for one."""
SPEEDS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Times a stage's own time until the next stage's turn in a building block."""
EFFORT = 1_500_000
"""Actions woven before the search ends: a second or two on one core."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Found:
    """The best program, and how good it can be at most."""

    program: Program
    timeline: Timeline
    bound: float
    """No program on any of the stage layouts that were looked at has a smaller makespan."""
    best_named: str | None
    """The best named schedule that fits the memory; None if none does."""
    woven: int
    """Orders tried."""

    @property
    def gap(self) -> float:
        """By which part of the bound the makespan is above it."""
        return self.timeline.makespan / self.bound - 1 if self.bound else 0.0


def auto(
    ranks: int,
    microbatches: int,
    costs: Costs | None = None,
    *,
    memory: Limit = None,
    split: bool = True,
    named: Mapping[str, Schedule] = NAMED,
    effort: int = EFFORT,
) -> Found:
    """Search for the program with the smallest makespan; among equal ones, with the smallest longest span.

    costs: with lists they fit only schedules with as many stages. memory: limit of each rank, in the
    unit of ``costs.held`` (from F to the backward) and ``costs.deferred`` (from B to W); none if left
    out. split: whether W can be taken out of the backward. Never worse than a named schedule that
    fits. Raises ConfigError if nothing fits the memory.
    """
    costs = costs or Costs()
    limit = _limits(memory, ranks)
    programs = [p for p in _named_programs(ranks, microbatches, costs, named) if split or not _splits(p)]
    fitting = [t for p in programs if _fits((t := simulate(p, costs)), limit)]
    best = min(fitting, key=_figure, default=None)
    best_named = None if best is None else best.program.name
    layouts = list(dict.fromkeys([*(p.stages for p in programs), *_chain_if_it_fits(ranks, costs)]))
    woven = 0
    for where in layouts:
        loom = Loom(where, microbatches, costs, limit, split)
        search = _Search(loom, effort // len(layouts))
        search.start([p for p in programs if p.stages == where])
        search.improve(random.Random(0))
        woven += search.tried
        if search.best is not None:
            timeline = simulate(loom.program(search.best, "auto"), costs)
            if _fits(timeline, limit) and (best is None or _figure(timeline) < _figure(best)):
                best = timeline
    if best is None:
        raise ConfigError(
            f"no schedule of {microbatches} microbatches on {ranks} ranks fits a memory of {memory!r}: a stage holds "
            f"{max(costs.memory(chain(ranks))[0]) if not isinstance(costs.held, Sequence) else max(costs.held)} a "
            "microbatch; raise the limit, recompute activations, or use more microbatches or ranks"
        )
    bound = min(lower_bound(where, microbatches, costs, limit, split=split) for where in layouts)
    return Found(best.program, best, bound, best_named, woven)


def automatic(costs: Costs, *, memory: Limit = None, split: bool = True, effort: int = EFFORT) -> Schedule:
    """``auto`` as a schedule, for an engine."""

    def schedule(ranks: int, microbatches: int) -> Program:
        return auto(ranks, microbatches, costs, memory=memory, split=split, effort=effort).program

    return schedule


def _limits(memory: Limit, ranks: int) -> list[float]:
    limit = list(memory) if isinstance(memory, Sequence) else [inf if memory is None else memory] * ranks
    if len(limit) != ranks or not all(x > 0 for x in limit):
        raise ConfigError(f"the memory limit must be one positive number, or one for each of {ranks} ranks: {memory!r}")
    return limit


def _named_programs(ranks: int, microbatches: int, costs: Costs, named: Mapping[str, Schedule]) -> list[Program]:
    """The training schedules whose stages the costs fit."""
    programs = [make(ranks, microbatches) for name, make in named.items() if name != "forward"]
    return [p for p in programs if costs.fits(p.stages)]


def _chain_if_it_fits(ranks: int, costs: Costs) -> list[tuple[int, ...]]:
    return [chain(ranks)] if costs.fits(chain(ranks)) else []


def _splits(program: Program) -> bool:
    return any(a.op == "W" for row in program.ranks for a in row)


def _fits(timeline: Timeline, limit: Sequence[float]) -> bool:
    return all(peak <= most * (1 + ROUNDING) for peak, most in zip(timeline.peak, limit, strict=True))


def _figure(result: Timeline | Woven) -> tuple[float, float]:
    """What is minimised; rounded, so that equal makespans are equal however they were added up."""
    span = result.span if isinstance(result, Woven) else max(result.spans)
    return float(f"{result.makespan:.9e}"), float(f"{span:.9e}")


class _Search:
    """The best order on one layout of stages."""

    def __init__(self, loom: Loom, effort: int) -> None:
        self.loom, self.effort, self.tried = loom, effort, 0
        self.best: Woven | None = None
        self.figure = (inf, inf)
        self.orders: list[Order] = []
        self.patience = PATIENCE[0]
        self.cost = (3 if loom.split else 2) * loom.stages * loom.m

    def start(self, programs: Sequence[Program]) -> None:
        """Orders of the named schedules, then of the warm-ups and blocks as long as the effort lasts."""
        for program in programs:
            self._try(self.loom.orders_of(program), PATIENCE)
        for orders in self._families():
            if self.effort <= 0:
                return
            self._try(orders, PATIENCE[:2])

    def _families(self) -> Iterator[list[Order]]:
        if self.loom.stages == self.loom.ranks:
            for warm in _warmups(self.loom):
                yield _one_f_one_b(self.loom.m, warm)
        for down, up in product(SPEEDS, repeat=2):
            yield _repeated(self.loom, down, up)

    def improve(self, draw: random.Random) -> None:
        """Small changes as long as the effort lasts, each kept if it is not worse."""
        while self.best is not None and self.effort > 0:
            orders = (
                _shift(self.orders, self.loom, draw) if draw.random() < 0.5 else _swap(self.orders, self.loom, draw)
            )
            self._try(orders, (self.patience if draw.random() < 0.7 else draw.choice(PATIENCE),), equal=True)

    def _try(self, orders: list[Order], patiences: Sequence[float], equal: bool = False) -> None:
        for patience in patiences if self.loom.split else patiences[:1]:
            self.tried += 1
            self.effort -= self.cost
            woven = self.loom.weave(orders, patience)
            if woven is None:
                return
            figure = _figure(woven)
            if figure < self.figure or (equal and figure == self.figure):
                self.figure = figure
                self.best, self.orders, self.patience = woven, orders, patience


def _warmups(loom: Loom) -> Iterator[tuple[int, ...]]:
    """Forwards ahead of the first backward of each rank: ``most`` on rank 0, ``slope`` fewer on each next."""
    p, m = loom.ranks, loom.m
    room = [int(min(m, limit / held)) if held else m for limit, held in zip(loom.limit, loom.held, strict=True)]
    most = sorted({min(room[0], k) for k in [*range(max(1, p // 2), 2 * p + 3), m]}, reverse=True)
    seen = set()
    for k, slope in product(most, (2.0, 1.0, 1.5, 1.25, 1.75, 2.25, 0.5, 0.0)):
        warm = tuple(max(1, min(room[r], round(k - slope * r))) for r in range(p))
        if warm not in seen:
            seen.add(warm)
            yield warm


def _one_f_one_b(m: int, warm: Sequence[int]) -> list[Order]:
    p = len(warm)
    return [
        _alternate([r * m + k for k in range(m)], [(p + r) * m + k for k in range(m)], w) for r, w in enumerate(warm)
    ]


def _repeated(loom: Loom, down: float, up: float) -> list[Order]:
    """Orders by the times of a block; F through the first half of the stages and B through the second (down a V)
    take ``down`` times as long as they could, the others ``up`` times."""
    half, numbers = loom.stages // 2, range(loom.stages)
    path = [*numbers, *(loom.stages + s for s in reversed(numbers))]
    stretch = [down if (s < half) == forward else up for forward in (True, False) for s in numbers]
    begins, clock = {}, 0.0
    for line in path:
        begins[line] = clock
        clock += stretch[line] * (loom.seconds[line] + loom.delay[line])
    work = [0.0] * loom.ranks
    for s, rank in enumerate(loom.where):
        work[rank] += loom.seconds[s] + loom.seconds[loom.stages + s] + (loom.weights[s] if loom.split else 0.0)
    timed: list[list[tuple[float, int]]] = [[] for _ in work]
    for line, begin in begins.items():
        row = timed[loom.where[line % loom.stages]]
        row += [(begin + k * max(work), line * loom.m + k) for k in range(loom.m)]
    return [[number for _, number in sorted(row)] for row in timed]


def _alternate(forwards: Order, backwards: Order, ahead: int) -> Order:
    """``ahead`` forwards, then backward and forward in turn."""
    ahead = min(ahead, len(forwards))
    turns = [x for pair in zip(backwards, forwards[ahead:], strict=False) for x in pair]
    return forwards[:ahead] + turns + backwards[len(forwards) - ahead :]


def _shift(orders: list[Order], loom: Loom, draw: random.Random) -> list[Order]:
    """From one backward on, a rank (or all from it on) has one more, or one less, forward ahead."""
    first = draw.randrange(len(orders))
    last = len(orders) if draw.random() < 0.3 else first + 1
    share, later = draw.random() if draw.random() < 0.5 else 0.0, draw.random() < 0.5
    return [
        _shifted(order, int(share * len(order)), loom, later) if first <= r < last else order
        for r, order in enumerate(orders)
    ]


def _shifted(order: Order, start: int, loom: Loom, later: bool) -> Order:
    """Every forward (or every backward) after ``start`` moves before the action ahead of it, where they differ."""
    half = loom.stages * loom.m
    moved = list(order)
    i = start
    while i + 1 < len(moved):
        ahead, here = moved[i], moved[i + 1]
        if (ahead < half) != (here < half) and (here < half) != later and not _needs(here, ahead, loom):
            moved[i], moved[i + 1] = here, ahead
            i += 1
        i += 1
    return moved


def _swap(orders: list[Order], loom: Loom, draw: random.Random) -> list[Order]:
    """A forward and a backward next to each other, or those of two stages, change places."""
    r = draw.randrange(len(orders))
    order = list(orders[r])
    i = draw.randrange(len(order) - 1)
    reach = draw.randrange(1, 4)
    for k in range(i, min(i + reach, len(order) - 1)):
        if order[k] // loom.m == order[k + 1] // loom.m or _needs(order[k + 1], order[k], loom):
            break
        order[k], order[k + 1] = order[k + 1], order[k]
    return [order if k == r else o for k, o in enumerate(orders)]


def _needs(later: int, earlier: int, loom: Loom) -> bool:
    """Whether two actions of one rank must keep their order: the same stage, or neighbours of one microbatch."""
    half = loom.stages * loom.m
    if later % loom.m != earlier % loom.m:
        return False
    return (later < half) == (earlier < half) or (later % half) // loom.m == (earlier % half) // loom.m
