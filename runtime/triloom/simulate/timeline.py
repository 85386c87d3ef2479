"""What a simulation gives: when each action ran, and the figures people quote. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..actions import Action, Program


class Span(NamedTuple):
    """An action and when it was at work; what it waited for before is not in it."""

    action: Action
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A program with its times."""

    program: Program
    ranks: tuple[tuple[Span, ...], ...]
    """ranks[r][i]: the i-th action of coordinate r on its main lane. Posts take no time there, unless
    they cost the rank some of its own."""
    lanes: tuple[tuple[Span, ...], ...]
    """lanes[r]: what coordinate r posted and when it was under way: SENDs up to their arrival, REDUCE, UNSHARD."""
    busy: tuple[float, ...]
    """Per coordinate, the time it computed (state actions on the main lane included)."""
    peak: tuple[float, ...]
    """Per coordinate, the most memory held at once, from F to the backward and from B to W."""
    end: tuple[float, ...]
    """Per coordinate, when its last action was over, posted ones included."""

    @property
    def makespan(self) -> float:
        """Time from 0 to the end of the last action."""
        return max(self.end, default=0.0)

    @property
    def spans(self) -> tuple[float, ...]:
        """Per coordinate, the time from the begin of its first compute to the end of its last action."""
        return tuple(
            end - next((s.begin for s in row if s.end > s.begin), end)
            for row, end in zip(self.ranks, self.end, strict=True)
        )

    @property
    def ideal(self) -> float:
        """The busiest coordinate's computing: no order of its actions is shorter."""
        return max(self.busy, default=0.0)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they do not compute: 1 - busy / (ranks x makespan)."""
        return _ratio(len(self.busy) * self.makespan - sum(self.busy), len(self.busy) * self.makespan)

    @property
    def bubble_span(self) -> float:
        """(cost - ideal) / cost, where cost is the longest span of any one coordinate (arXiv 2401.10241, section 5)."""
        cost = max(self.spans, default=0.0)
        return _ratio(cost - self.ideal, cost)

    @property
    def bubble_ideal(self) -> float:
        """(makespan - ideal) / ideal, as in arXiv 2104.04473: over the ideal time, not the total."""
        return _ratio(self.makespan - self.ideal, self.ideal)

    def figures(self) -> dict[str, Any]:
        """The figures as plain values for JSON."""
        return {
            "name": self.program.name,
            "ranks": len(self.ranks),
            "stages": len(self.program.stages),
            "microbatches": self.program.microbatches,
            "makespan": self.makespan,
            "ideal": self.ideal,
            "bubble": self.bubble,
            "bubble_span": self.bubble_span,
            "bubble_ideal": self.bubble_ideal,
            "busy": list(self.busy),
            "peak": list(self.peak),
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
