"""What the tuner tries, as data: for each table, by the sizes of its entries, lists of options to combine.

An entry takes the first range whose ``upto`` holds its sizes, as in the tables themselves. The names in ``options`` are
those of the entry it replaces. PROGRAMS are multiples of the multiprocessors of an H200 (132), which others round to.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """Candidates for sizes up to a bound."""

    upto: Mapping[str, int]
    options: Sequence[Options]


def each(upto: Mapping[str, int] | None = None, num_stages: Sequence[int] = (1,), **lists: Sequence[int]) -> Range:
    """Every combination of the lists."""
    names = [*lists, "num_stages"]
    rows = itertools.product(*lists.values(), num_stages)
    return Range(upto or {}, [dict(zip(names, row, strict=True)) for row in rows])


def tiles(upto: Mapping[str, int], names: str, *rows: tuple[int, ...]) -> Range:
    """Candidates one by one."""
    return Range(upto, [dict(zip(names.split(), row, strict=True)) for row in rows])


WALK = "BLOCK_M BLOCK_N EDGE num_warps num_stages"
NARROW, MIDDLE, WIDE = ({"width": width, "bytes": 2} for width in (64, 128, 256))
EXACT = ({"width": 64, "bytes": 4}, {"width": 256, "bytes": 4})
"""fp32: true products, checked rather than fast."""
EXACT_WALKS = (
    tiles(EXACT[0], WALK, (32, 32, 32, 4, 1), (16, 32, 16, 4, 1), (32, 16, 16, 4, 1)),
    tiles(EXACT[1], WALK, (16, 16, 16, 4, 1), (16, 16, 16, 2, 1)),
)
PROGRAMS = (132, 264, 528)

CANDIDATES: Mapping[str, Sequence[Range]] = {
    "norm_forward": (
        each({"width": 256}, ROWS=(4, 8, 16, 32), num_warps=(2, 4, 8)),
        each({"width": 1024}, ROWS=(1, 2, 4, 8), num_warps=(2, 4, 8)),
        each({"width": 4096}, ROWS=(1, 2), num_warps=(4, 8)),
        each({"width": 8192}, ROWS=(1,), num_warps=(4, 8, 16)),
        each({"width": 16384}, ROWS=(1,), num_warps=(8, 16)),
        each(ROWS=(1,), WIDTH=(2048, 4096, 8192), num_warps=(8, 16)),
    ),
    "norm_backward": (
        each({"width": 256}, ROWS=(4, 8), PROGRAMS=(264, 528), STAGES=(1, 2), num_warps=(4, 8)),
        each({"width": 1024}, ROWS=(2, 4), PROGRAMS=(264, 528), STAGES=(1, 2), num_warps=(8,)),
        each({"width": 4096}, ROWS=(1,), PROGRAMS=PROGRAMS, STAGES=(1, 2), num_warps=(8, 16)),
        each({"width": 8192}, ROWS=(1,), PROGRAMS=(132, 264), STAGES=(1, 2), num_warps=(16,)),
        each(ROWS=(2, 4), WIDTH=(512, 1024), PROGRAMS=(132, 264), num_warps=(4, 8)),
    ),
    "sum_rows": (each(ROWS=(32, 64, 128), WIDTH=(16, 32, 64), num_warps=(4,)),),
    "gated": (
        each({"width": 128}, ROWS=(4, 8, 16), WIDTH=(128,), num_warps=(2, 4)),
        each({"width": 512}, ROWS=(1, 2, 4), WIDTH=(512,), num_warps=(4, 8)),
        each(ROWS=(1, 2), WIDTH=(1024, 2048), num_warps=(4, 8)),
    ),
    "gelu": (
        each({"width": 128}, ROWS=(4, 8), WIDTH=(128,), PROGRAMS=(264, 528), num_warps=(2, 4)),
        each({"width": 512}, ROWS=(1, 2), WIDTH=(512,), PROGRAMS=(264, 528), num_warps=(4, 8)),
        each(ROWS=(1, 2), WIDTH=(1024,), PROGRAMS=PROGRAMS, num_warps=(4, 8)),
    ),
    "dropout": (
        each({"width": 128}, ROWS=(4, 8), WIDTH=(128,), PROGRAMS=(264, 528), num_warps=(2, 4)),
        each({"width": 512}, ROWS=(1, 2), WIDTH=(512,), PROGRAMS=(264, 528), num_warps=(4, 8)),
        each(ROWS=(1, 2), WIDTH=(1024,), PROGRAMS=PROGRAMS, num_warps=(4, 8)),
    ),
    "split_rotate": (
        each({"head_dim": 64}, HEADS=(16, 32, 64), num_warps=(2, 4, 8)),
        each({"head_dim": 128}, HEADS=(8, 16, 32), num_warps=(2, 4, 8)),
        each(HEADS=(4, 8, 16), num_warps=(4, 8)),
    ),
    "attention_forward": (
        tiles(NARROW, WALK, (128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 64, 64, 4, 3), (64, 64, 32, 4, 3)),
        tiles(MIDDLE, WALK, (128, 128, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 32, 8, 2), (64, 64, 32, 4, 3)),
        tiles(WIDE, WALK, (128, 64, 32, 8, 2), (128, 32, 32, 8, 2), (64, 64, 32, 8, 2)),
        *EXACT_WALKS,
    ),
    "attention_dkdv": (
        tiles(NARROW, WALK, (64, 128, 32, 8, 3), (64, 128, 32, 8, 2), (64, 64, 32, 4, 2), (32, 128, 32, 8, 3)),
        tiles(MIDDLE, WALK, (64, 128, 32, 8, 2), (64, 64, 32, 8, 2), (32, 128, 32, 8, 2)),
        tiles(WIDE, WALK, (64, 64, 32, 8, 2), (32, 64, 32, 8, 2)),
        *EXACT_WALKS,
    ),
    "attention_dq": (
        tiles(NARROW, WALK, (128, 128, 64, 8, 2), (128, 64, 64, 8, 3), (128, 64, 32, 8, 2), (64, 64, 32, 4, 2)),
        tiles(MIDDLE, WALK, (128, 64, 64, 8, 2), (128, 64, 32, 8, 2), (64, 64, 32, 8, 2)),
        tiles(WIDE, WALK, (64, 64, 32, 8, 2), (64, 32, 32, 8, 2)),
        *EXACT_WALKS,
    ),
    "attention_dots": (each(BLOCK_M=(16, 32, 64), num_warps=(4, 8)),),
    "loss_statistics": (
        each({"vocab": 2048}, WIDTH=(1024, 2048), num_warps=(4, 8)),
        each({"vocab": 8192}, WIDTH=(2048, 4096, 8192), num_warps=(8,)),
        each(WIDTH=(4096, 8192), num_warps=(8, 16)),
    ),
    "loss_gradient": (
        each({"vocab": 2048}, WIDTH=(1024, 2048), num_warps=(4, 8)),
        each(WIDTH=(2048, 4096, 8192), num_warps=(8,)),
    ),
    "adamw": (each(SIZE=(1024, 2048, 4096), num_warps=(4, 8)),),
    "adamw8": (each(ROWS=(4, 8, 16), num_warps=(4, 8)),),
    "square_sums": (each(ROWS=(8, 16), num_warps=(4, 8)),),
    "rank_sum": (each(SIZE=(1024, 2048, 4096), num_warps=(4, 8)),),
    "pack": (each(SIZE=(1024, 2048, 4096), num_warps=(4, 8)),),
    "quantise": (each(ROWS=(16, 32, 64), num_warps=(4, 8)),),
    "take": (each(SIZE=(256, 512, 1024, 2048), num_warps=(4,)),),
    "weight_product": (
        tiles(
            {"bytes": 2}, "BLOCK_M BLOCK_N BLOCK_K GROUP num_warps num_stages",
            (128, 128, 64, 8, 8, 3), (64, 128, 64, 8, 4, 4), (128, 64, 64, 8, 4, 3), (128, 128, 32, 8, 8, 4),
        ),
        tiles(
            {}, "BLOCK_M BLOCK_N BLOCK_K GROUP num_warps num_stages", (64, 64, 16, 8, 4, 2), (32, 64, 16, 8, 4, 2)
        ),
    ),
}  # fmt: skip


def candidates(op: str, sizes: Mapping[str, int], ranges: Mapping[str, Sequence[Range]] = CANDIDATES) -> list[Options]:
    """What to try for an entry of ``op`` at ``sizes`` (its bounds; without any, beyond all ranges with one)."""
    return list(next(_holding(ranges[op], sizes)).options)


def _holding(ranges: Sequence[Range], sizes: Mapping[str, int]) -> Iterator[Range]:
    return (r for r in ranges if all(sizes[name] <= bound for name, bound in r.upto.items()))
