"""Lower bounds of the makespan: no order of the actions can be shorter. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..simulate import Costs
from ..simulate.lower import hop


def lower_bound(
    where: Sequence[int], microbatches: int, costs: Costs, limit: Sequence[float], *, split: bool = True
) -> float:
    """The largest of four times that every program on these stages takes.

    Per rank: (work) until its first F can start, then all its computing; (way back) its forwards and
    backwards, then the last backward's way up to stage 0 and the last W there; (trips) with room for k
    microbatches of a stage, the (i+k)-th F waits for the i-th trip to the loss and back; (room) the
    memory that all trips hold over time, divided by the limit.
    """
    m, stages = microbatches, len(where)
    f, w = costs.seconds("F", where), costs.seconds("W", where)
    b = costs.seconds("B", where)
    fused = [min(x, y + z) for x, y, z in zip(costs.seconds("BW", where), b, w, strict=True)]
    if not split:
        b = fused = costs.seconds("BW", where)
    w = [max(0.0, whole - part) for whole, part in zip(fused, b, strict=True)]
    held, deferred = costs.memory(where)
    kept = [min(h, d) for h, d in zip(held, deferred, strict=True)]
    there = [sum(hop(costs, where, "act", s)) for s in range(stages)]
    back = [sum(hop(costs, where, "grad", s)) for s in range(stages)]
    head = [0.0, *accumulate(x + d for x, d in zip(f, there, strict=True))]
    tail = [0.0, *accumulate(x + d for x, d in zip(b[:-1], back[1:], strict=True))]
    trip = [0.0] * (stages + 1)
    for s in reversed(range(stages)):
        trip[s] = f[s] + b[s] + (there[s] + trip[s + 1] + back[s + 1] if s + 1 < stages else 0.0)
    bounds = []
    for rank in range(max(where) + 1):
        mine = [s for s, c in enumerate(where) if c == rank]
        start = min(head[s] for s in mine)
        bounds.append(start + m * sum(f[s] + fused[s] for s in mine))
        bounds.append(start + m * sum(f[s] + b[s] for s in mine) + min(tail[s] for s in mine) + w[0])
        room = sum(m * (held[s] * trip[s] + kept[s] * w[s]) for s in mine)
        bounds.append(start + room / limit[rank] if limit[rank] else 0.0)
        for s in mine:
            if held[s] and held[s] <= limit[rank] * (1 + 1e-9):
                trips = -(-m // int(min(m, limit[rank] * (1 + 1e-9) / held[s])))
                bounds.append(head[s] + trips * trip[s] + tail[s] + w[0])
    return max(bounds)
