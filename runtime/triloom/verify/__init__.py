"""The verifier: proves a program before its first step, or refuses it with the grid and the culprits.

It proves that the program cannot deadlock, that nothing is used before it is made, that every
microbatch is computed once and summed in order, and what its peak memory is. What it takes for
granted is part of the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..actions import Program
from ..errors import ConfigError
from ..grid import Place
from ..lanes import Lanes, find_lanes
from ..passes import StateLayout
from ..placement import Placement
from .facts import read
from .footprint import Collective, Footprint, Groups, inside, state_footprint, state_groups
from .held import Held, held
from .peak import StageBytes, in_flight, peak_bytes
from .rules import RULES
from .run import run
from .state_rules import state_in_order

__all__ = [
    "Collective",
    "Footprint",
    "Groups",
    "Held",
    "StageBytes",
    "Verdict",
    "held",
    "inside",
    "state_footprint",
    "state_groups",
    "verify",
]

ASSUMED = (
    "units issue the collectives of their declared footprint, in its order",
    "no communication depends on data",
    "the data- and tensor-parallel replicas of a pipeline coordinate run the same list",
    "device kernels that communicate at the same time fit on the device together",
)

W_APART = "units in which nothing can wait for their W compute it in B (Engine.unsplit names them after a step)"
"""Assumed of programs with a separate W."""


@dataclass(frozen=True)
class Verdict:
    """What holds of a program that was accepted."""

    lanes: str
    """Name of the lanes the proof was made for."""
    assumed: tuple[str, ...]
    proven: tuple[str, ...]
    in_flight: tuple[int, ...]
    """Per pipeline coordinate, the most microbatches (of one stage each) between F and backward."""
    peak_bytes: tuple[int, ...] | None
    """Per pipeline coordinate, a bound on the bytes of activations; None if no sizes were given."""
    order: tuple[Place, ...]
    """(coordinate, step) of all actions in an order in which they can run."""
    headers: bool = False
    """Activations travel behind a header with their shapes, so that nobody knows their bytes before."""

    def __str__(self) -> str:
        peak = "" if self.peak_bytes is None else f", {max(self.peak_bytes)} bytes of activations at most"
        peak = ", bytes of activations unknown: their shapes come with the data" if self.headers else peak
        lines = [f"accepted on {self.lanes} lanes; at most {max(self.in_flight)} microbatches in flight{peak}"]
        lines += [f"  proven: {p}" for p in self.proven] + [f"  assumed: {a}" for a in self.assumed]
        return "\n".join(lines)


def verify(
    program: Program,
    *,
    lanes: str | Lanes = "independent",
    footprint: Footprint | None = None,
    groups: Groups | None = None,
    sizes: Sequence[StageBytes] | None = None,
    layout: StateLayout | None = None,
    placement: Placement | None = None,
    headers: bool = False,
) -> Verdict:
    """Prove a program or raise ProgramError with the reason, the actions and the rank-by-step grid.

    lanes: how posted operations progress, a name from ``lanes.NAMED`` or a function.
    footprint: the collectives of each action, the state actions' included; by default those of
    ``state_footprint(layout)``, and none inside computes.
    groups: the coordinates in each group that the footprint names, beyond ``state_groups(layout)``.
    sizes: bytes per stage; with them the verdict has ``peak_bytes``.
    layout: needed for unit and state actions.  placement: with it, UNSHARD is required or refused.
    headers: an activation is two messages on its lane, the first with the shapes of the second, whose receive is posted
    when it is used; the proof is that of the program with every receive there. ``peak_bytes`` is then None.
    """
    _check_shape(program, sizes)
    lane_name, lane_of = find_lanes(lanes)
    facts = read(program, layout)
    proven = []
    for claim, rule in RULES:
        rule(facts)
        proven.append(claim)
    if state_in_order(facts, placement):
        proven.append("each bucket is reduced after its last gradient, then clipped, stepped and gathered, once")
    known = state_groups(layout, len(program.ranks)) | dict(groups or {})
    order = run(facts, lane_of, footprint or state_footprint(layout), known, late=headers)
    proven.append("members of a group issue the same collectives in the same order")
    proven.append(f"no deadlock without any buffering, on {lane_name} lanes")
    bound = None if sizes is None or headers else peak_bytes(facts, sizes)
    if bound is not None:
        proven.append("peak bytes of activations, whatever the timing")
    assumed = ASSUMED + (W_APART,) * any(op == "W" for op, _, _ in facts.spans)
    if headers:
        proven.append("a header travels on the lane of its activation, before it")
    return Verdict(lane_name, assumed, tuple(proven), in_flight(facts), bound, order, headers)


def _check_shape(program: Program, sizes: Sequence[StageBytes] | None) -> None:
    if not program.stages or not all(0 <= c < len(program.ranks) for c in program.stages):
        raise ConfigError(
            f"program {program.name!r} puts stages on coordinates {program.stages}, it has rows for 0 to "
            f"{len(program.ranks) - 1}"
        )
    if program.microbatches < 1:
        raise ConfigError(f"program {program.name!r} needs at least one microbatch, got {program.microbatches}")
    if sizes is not None and len(sizes) != len(program.stages):
        raise ConfigError(f"sizes are of {len(sizes)} stages, program {program.name!r} has {len(program.stages)}")
