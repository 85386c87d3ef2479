"""Interleaved measurement, inside the processes that are measured.

Contenders run in turn, A B A B ..., one block of work each, in the same processes and after a barrier,
so that whatever else the machine does meets all of them alike. A block's time is that of its slowest
rank. Reported are each contender's median, minimum and maximum, and per pair the median over rounds of
the *paired* ratio (two blocks that ran next to each other): a drift of the machine cancels out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from triloom.groups.base import Group
from triloom.groups.objects import gather_objects

Block = Callable[[], object]
MIN_ROUNDS = 7


@dataclass(frozen=True)
class Pair:
    """A contender to be compared with others; the fastest of ``peers`` (by median) counts."""

    ours: str
    peers: tuple[str, ...]
    target: float | None = None
    """Smallest ratio that is good enough; None where the figure is information."""


@dataclass(frozen=True)
class Contender:
    """Seconds of a block, and the rate that makes of ``amount`` per block."""

    median_s: float
    min_s: float
    max_s: float
    rate: float


@dataclass(frozen=True)
class Ratio:
    """How many times faster ``ours`` is than ``peer``: median, least and largest of the paired ratios."""

    ours: str
    peer: str
    median: float
    min: float
    max: float
    target: float | None

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.median >= self.target


@dataclass(frozen=True)
class Result:
    """One table of a bench."""

    title: str
    unit: str
    setup: dict[str, Any]
    rounds: int
    contenders: dict[str, Contender]
    ratios: list[Ratio]
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        out = asdict(self)
        for row, ratio in zip(out["ratios"], self.ratios, strict=True):
            row["met"] = ratio.met
        return out


def interleave(group: Group, blocks: Mapping[str, Block], *, rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of the slowest rank, by contender and round. Collective: every rank passes the same names."""
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds={rounds}: a median needs at least {MIN_ROUNDS}")
    mine: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(-warmup, rounds):
        for name, run in blocks.items():
            group.barrier().wait()
            start = time.perf_counter()
            run()
            if turn >= 0:
                mine[name].append(time.perf_counter() - start)
    everyone = gather_objects(group, mine)
    return {name: [max(times) for times in zip(*(rank[name] for rank in everyone), strict=True)] for name in blocks}


def compare(times: Mapping[str, Sequence[float]], pair: Pair) -> Ratio:
    """The paired ratio against the fastest peer that ran."""
    peers = [p for p in pair.peers if p in times]
    if not peers:
        raise ValueError(f"none of the peers {pair.peers} of {pair.ours!r} ran")
    peer = min(peers, key=lambda p: statistics.median(times[p]))
    ratios = [p / o for p, o in zip(times[peer], times[pair.ours], strict=True)]
    return Ratio(pair.ours, peer, statistics.median(ratios), min(ratios), max(ratios), pair.target)


def summarise(
    title: str,
    unit: str,
    amount: float,
    times: Mapping[str, Sequence[float]],
    pairs: Sequence[Pair],
    *,
    setup: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> Result:
    """amount: what one block does, in ``unit`` without its per-second. Pairs whose sides did not run are left out."""
    contenders = {
        name: Contender(statistics.median(t), min(t), max(t), amount / statistics.median(t))
        for name, t in times.items()
    }
    ran = [p for p in pairs if p.ours in times and any(peer in times for peer in p.peers)]
    rounds = min(map(len, times.values()))
    return Result(title, unit, dict(setup), rounds, contenders, [compare(times, p) for p in ran], list(notes))


def same_losses(group: Group, losses: Mapping[str, Sequence[float | None]], *, rtol: float) -> dict[str, list[float]]:
    """Losses of the first steps by contender, averaged over the ranks that know one.

    Raises ValueError, on every rank, where two contenders differ by more than ``rtol``: then they did not do
    the same work, and their times say nothing.
    """
    everyone = gather_objects(group, {name: list(values) for name, values in losses.items()})
    means = {name: [_mean(row) for row in zip(*(rank[name] for rank in everyone), strict=True)] for name in losses}
    first, *others = means
    for other in others:
        for step, (a, b) in enumerate(zip(means[first], means[other], strict=True)):
            if not abs(a - b) <= rtol * abs(a):
                raise ValueError(
                    f"{first!r} and {other!r} do not train alike: loss {a:.7f} and {b:.7f} at step {step} "
                    f"(allowed: {rtol:g} of it); nothing is reported"
                )
    return means


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else float("nan")


def table(result: Mapping[str, Any]) -> str:
    """A result (as JSON) as text."""
    width = max(map(len, result["contenders"]), default=0)
    lines = [f"{result['title']}   ({result['rounds']} rounds, medians)"]
    for name, c in result["contenders"].items():
        spread = f"{c['min_s'] * 1e3:9.1f} .. {c['max_s'] * 1e3:.1f}"
        lines.append(
            f"  {name:{width}}  {c['rate']:10.0f} {result['unit']}  block {c['median_s'] * 1e3:9.1f} ms {spread}"
        )
    for r in result["ratios"]:
        verdict = "" if r["target"] is None else f"  target {r['target']:.2f}: {'met' if r['met'] else 'MISSED'}"
        lines.append(f"  {r['ours']} / {r['peer']} = {r['median']:.3f}  ({r['min']:.2f} .. {r['max']:.2f}){verdict}")
    lines += [f"  note: {note}" for note in result["notes"]]
    return "\n".join(lines)
