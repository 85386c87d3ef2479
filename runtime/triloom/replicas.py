"""Are the parameters that several ranks hold alike still alike? A 64-bit fingerprint of each is compared.

The fingerprint of a parameter is the sum of ``word[i] * (2 i + 1)`` modulo 2^64 over its 32-bit (or shorter) words: a
change of any one changes it, because an odd factor has an inverse, and the parts of a sharded parameter add up.
It reads every parameter once, and sends 8 bytes for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from .errors import DivergedError
from .groups.base import Group
from .groups.fingerprint import rank_list
from .groups.objects import gather_objects
from .parallel.flat import pieces

if TYPE_CHECKING:
    from .engine import Engine

CHUNK = 1 << 20
"""Words looked at together; they need 24 bytes each besides."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
"""By the bytes of an element, the integers it is read as. At most 32 bits, so that the factor reaches the highest."""

SHOWN = 8
"""Parameters that an error names."""
WAY_OUT = (
    "they must be equal bit for bit. If no code of yours changed them on one rank only, suspect the memory of that "
    "machine; start again from the last checkpoint"
)


def fingerprint(values: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Sum of a flat tensor's bits, 0-dim int64. first: index of its first element in the whole parameter."""
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    words = values.detach().view(WORDS[values.element_size()])
    first *= len(words) // max(1, len(values))
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].to(torch.int64)
        index = torch.arange(first + start, first + start + len(part), dtype=torch.int64, device=values.device)
        total += (part * (2 * index + 1)).sum()
    return total


class Replicas(NamedTuple):
    """What a comparison found."""

    alike: int
    """Parameters of this rank that another rank holds too."""
    differing: tuple[str, ...]
    """A line for every parameter whose holders do not agree; the same on every rank."""


def check_replicas(engine: Engine) -> int:
    """Raise DivergedError on every rank, naming parameters and ranks, if :func:`compare_replicas` finds a difference.

    Returns the number of this rank's parameters that another rank holds too.
    """
    found = compare_replicas(engine)
    if found.differing:
        more = f" and {len(found.differing) - SHOWN} more" if len(found.differing) > SHOWN else ""
        raise DivergedError(
            f"before step {engine.steps}, ranks hold different values of the same parameter: "
            f"{', '.join(found.differing[:SHOWN])}{more}; {WAY_OUT}"
        )
    return found.alike


def compare_replicas(engine: Engine) -> Replicas:
    """Compare over dp, over tp what is not split, and between the uses of tied parameters; between steps, collective.

    What each dp rank holds a part of (ZeRO-3) has no second copy over dp.
    """
    params, dp = engine.state.params, engine.groups.axis("dp")
    held = {name: (total, block) for name, total, block in _local(engine)}
    everyone = _gather(dp, [total for total, _ in held.values()])
    found = [
        text
        for i, (name, (_, block)) in enumerate(held.items())
        for place in range(block)
        for text in _differing(name, "dp", [row[i] for row in everyone[place::block]], dp.members[place::block])
    ]
    totals = {
        name: sum(row[i] for row in everyone[:block]) % 2**64 for i, (name, (_, block)) in enumerate(held.items())
    }

    tp = engine.groups.axis("tp")
    whole = [name for name in totals if params[name].spec.dim is None]
    over_tp = _gather(tp, [totals[name] for name in whole])
    for i, name in enumerate(whole):
        found += _differing(name, "tp", [row[i] for row in over_tp], tp.members)

    pp = engine.groups.axis("pp")
    tied = {n: totals[n] for n in totals if (tie := params[n].tie) is not None and len(tie.members()) > 1}
    uses = gather_objects(pp, tied)
    for name in sorted({n for row in uses for n in row}):
        holders = [r for r, row in enumerate(uses) if name in row]
        found += _differing(name, "its uses", [uses[r][name] for r in holders], [pp.members[r] for r in holders])

    everything = gather_objects(engine.world, found)
    over_dp = {name for name, (_, block) in held.items() if dp.size > block}
    alike = len(over_dp | set(tied) | (set(whole) if tp.size > 1 else set()))
    return Replicas(alike, tuple(dict.fromkeys(text for one in everything for text in one)))


def _local(engine: Engine) -> Iterator[tuple[str, int, int]]:
    """Of each of this rank's parameters the fingerprint of what it holds, and how many dp ranks hold the whole."""
    dp = engine.groups.axis("dp")
    block = engine.placement.shard_ranks or dp.size
    names: list[str] = []
    sums: list[torch.Tensor] = []
    blocks: list[int] = []
    for state in engine.state.buckets:
        parts: dict[str, torch.Tensor | None] = dict.fromkeys(s.name for s in state.bucket.slots)
        if state.residency.params:
            for piece in pieces(state.bucket, dp.rank % block, block):
                held = state.param_shard[piece.start - state.shard.start : piece.stop - state.shard.start]
                parts[piece.slot.name] = fingerprint(held, piece.start - piece.slot.offset)
        else:
            for slot in state.bucket.slots:
                parts[slot.name] = fingerprint(state.params.tensor[slot.offset : slot.stop])
        zero = torch.zeros((), dtype=torch.int64, device=state.param_shard.device)
        names += list(parts)
        blocks += [block if state.residency.params else 1] * len(parts)
        sums += [zero if part is None else part for part in parts.values()]
    values = torch.stack(sums).tolist() if sums else []
    return zip(names, values, blocks, strict=True)


def _gather(group: Group, mine: Sequence[int]) -> list[list[int]]:
    """Numbers of every rank of a group, all of whose ranks have equally many."""
    signed = [v - 2**64 if v >= 2**63 else v for v in mine]
    out = torch.empty(group.size, len(signed), dtype=torch.int64)
    group.all_gather(out, torch.tensor(signed, dtype=torch.int64)).wait()
    return [[int(v) % 2**64 for v in row] for row in out.tolist()]


def _differing(name: str, over: str, values: Sequence[int], ranks: Sequence[int]) -> list[str]:
    """What to say of a parameter, if its holders do not agree."""
    sides: dict[int, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        sides.setdefault(value, []).append(rank)
    if len(sides) < 2:
        return []
    world = tuple(range(max(ranks) + 1))
    said = "; ".join(f"{rank_list(held, world)}: {value:016x}" for value, held in sides.items())
    return [f"{name} (over {over}): {said}"]
