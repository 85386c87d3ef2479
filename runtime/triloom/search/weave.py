"""Weaving: forwards and backwards in a given order, weight gradients where they cost least. Pure.

The heuristic of arXiv 2401.10241 (section 3.1), run forward in time over all ranks at once: a rank
that has to wait runs a W if the wait is long enough for (a part of) it, and must run Ws when its next F
would not fit its memory. Everything else keeps its order.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from ..actions import Action, Program, compute, stage_of
from ..simulate import Costs
from ..simulate.lower import hop

ROUNDING = 1e-9

Order = list[int]
"""Actions as numbers: with S stages and m microbatches, F of (stage s, microbatch k) is s m + k, B is (S + s) m + k,
W is (2 S + s) m + k."""


@dataclass(frozen=True)
class Woven:
    """Rows with their Ws, and when they would end."""

    rows: tuple[tuple[int, ...], ...]
    makespan: float
    span: float
    """The longest time from the first to the last action of a rank."""


class Loom:
    """Costs as lists by line (an operation of a stage), for many weavings of one model.

    split: False keeps W inside B.
    """

    def __init__(
        self, where: Sequence[int], microbatches: int, costs: Costs, limit: Sequence[float], split: bool
    ) -> None:
        self.where, self.m, self.split = tuple(where), microbatches, split
        self.limit = [x * (1 + ROUNDING) for x in limit]
        self.stages, self.ranks = len(self.where), max(self.where) + 1
        self.held, self.deferred = costs.memory(self.where)
        self.weights = costs.seconds("W", self.where)
        self.seconds = costs.seconds("F", self.where) + costs.seconds("B" if split else "BW", self.where)
        self.delay = [sum(hop(costs, self.where, kind, s)) for kind in ("act", "grad") for s in range(self.stages)]

    def orders_of(self, program: Program) -> list[Order]:
        """The forwards and backwards of a program on the same stages."""
        first = {"F": 0, "B": self.stages, "BW": self.stages}
        return [
            [(first[a.op] + stage_of(a)) * self.m + (a.microbatch or 0) for a in row if a.op in first]
            for row in program.ranks
        ]

    def program(self, woven: Woven, name: str) -> Program:
        ops = ("F", "B" if self.split else "BW", "W")

        def action(number: int) -> Action:
            line, microbatch = divmod(number, self.m)
            return compute(ops[line // self.stages], line % self.stages, microbatch)

        return Program(tuple(tuple(map(action, row)) for row in woven.rows), self.where, self.m, name)

    def weave(self, orders: Sequence[Order], patience: float) -> Woven | None:
        """Run the orders; patience: the part of a W that a known wait must hold. None if they cannot run to the end."""
        return _Weaving(self, orders, patience).run()


class _Weaving:
    """State of one run, by rank or by number of an action."""

    def __init__(self, loom: Loom, orders: Sequence[Order], patience: float) -> None:
        self.loom, self.orders, self.patience = loom, orders, patience
        size, numbers = len(orders), 2 * loom.stages * loom.m
        self.arrival, self.waiting = [-1.0] * numbers, [-1] * numbers
        self.place, self.level = [0] * size, [0.0] * size
        self.rows: list[list[int]] = [[] for _ in orders]
        self.deferred: list[list[int]] = [[] for _ in orders]
        self.settled = [0] * size
        self.begin, self.end = [-1.0] * size, [0.0] * size
        self.clocks = [(0.0, r) for r in range(size)]

    def run(self) -> Woven | None:
        """Always the rank whose clock is behind: so what has not been announced yet arrives later than now."""
        while self.clocks:
            now, rank = heapq.heappop(self.clocks)
            place, order = self.place[rank], self.orders[rank]
            if place == len(order):
                if self.settled[rank] < len(self.deferred[rank]):
                    self._settle(now, rank)
            elif not self._wait(now, rank, order[place]):
                self._compute(now, rank, order[place])
        if any(place < len(order) for place, order in zip(self.place, self.orders, strict=True)):
            return None
        span = max(end - begin for begin, end in zip(self.begin, self.end, strict=True))
        return Woven(tuple(map(tuple, self.rows)), max(self.end), span)

    def _wait(self, now: float, rank: int, number: int) -> bool:
        """Whether the rank's next F or B cannot run now; then something else has been arranged."""
        loom = self.loom
        line, lines = number // loom.m, 2 * loom.stages
        more = self.settled[rank] < len(self.deferred[rank])
        if line < loom.stages:
            if self.level[rank] + loom.held[line] > loom.limit[rank]:
                if more:
                    self._settle(now, rank)
                return True  # without a W to run the rank is stuck for good
            need = number - loom.m if line else -1
        else:
            need = number + loom.m if line < lines - 1 else -1
        if need < 0 or 0.0 <= self.arrival[need] <= now + ROUNDING * now:
            return False
        there = self.arrival[need]
        if more:
            w = loom.weights[self.deferred[rank][self.settled[rank]] // loom.m - lines]
            if there < 0.0 or there - now >= self.patience * w:
                self._settle(now, rank)
                return True
        if there < 0.0:
            self.waiting[need] = rank
        else:
            heapq.heappush(self.clocks, (there, rank))
        return True

    def _compute(self, now: float, rank: int, number: int) -> None:
        loom = self.loom
        line = number // loom.m
        if self.begin[rank] < 0.0:
            self.begin[rank] = now
        end = self.end[rank] = now + loom.seconds[line]
        self.place[rank] += 1
        self.rows[rank].append(number)
        if line < loom.stages:
            self.level[rank] += loom.held[line]
        else:
            stage = line - loom.stages
            self.level[rank] -= loom.held[stage]
            if loom.split:
                self.level[rank] += loom.deferred[stage]
                self.deferred[rank].append(number + loom.stages * loom.m)
        self.arrival[number] = there = end + loom.delay[line]
        heapq.heappush(self.clocks, (end, rank))
        if self.waiting[number] >= 0:
            heapq.heappush(self.clocks, (there, self.waiting[number]))

    def _settle(self, now: float, rank: int) -> None:
        """Run the oldest W."""
        number = self.deferred[rank][self.settled[rank]]
        self.settled[rank] += 1
        stage = number // self.loom.m - 2 * self.loom.stages
        self.level[rank] -= self.loom.deferred[stage]
        self.end[rank] = end = now + self.loom.weights[stage]
        self.rows[rank].append(number)
        heapq.heappush(self.clocks, (end, rank))
