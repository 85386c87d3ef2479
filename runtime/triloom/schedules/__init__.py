"""Schedules: in which order each pipeline coordinate computes. Pure, and compute actions only.

A schedule is a function of the number of ranks (pipeline coordinates) and of microbatches. It writes
what the paper draws; transfers and state are added by passes. Backwards and weight gradients run in
microbatch order in every schedule, because weight gradients are summed in microbatch order.
"""

from __future__ import annotations

from .base import Schedule, chain, forwards, looped, v_shaped
from .blocks import v_half, v_min
from .chains import forward_only, gpipe, one_f_one_b
from .loops import breadth_first, interleaved
from .zero_bubble import dualpipe_v, zb_h1, zb_h2, zb_v

__all__ = [
    "NAMED",
    "Schedule",
    "breadth_first",
    "chain",
    "dualpipe_v",
    "forward_only",
    "forwards",
    "gpipe",
    "interleaved",
    "looped",
    "one_f_one_b",
    "v_half",
    "v_min",
    "v_shaped",
    "zb_h1",
    "zb_h2",
    "zb_v",
]

NAMED: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped_bfs": breadth_first,
    "zb_h1": zb_h1,
    "zb_h2": zb_h2,
    "zb_v": zb_v,
    "v_half": v_half,
    "v_min": v_min,
    "dualpipe_v": dualpipe_v,
    "forward": forward_only,
}
