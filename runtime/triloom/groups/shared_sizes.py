"""Sizes of a shared-memory segment, from measurement.

``inline_bytes``: an input up to this travels in its header's row, and every rank reads every other's.
``block_bytes``: of a larger collective, what a rank hands each other rank in one step. ``ring_bytes``:
one step of a transfer. Four steps may be under way. Small blocks stay in the cores' own caches on
their way; large ones cost fewer exchanges and survive ranks that take turns on a core.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import _C

LEAST_BLOCK = 4096


@dataclass(frozen=True)
class Sizes:
    inline_bytes: int
    block_bytes: int
    ring_bytes: int


MEASURED: dict[int, Sizes] = {
    2: Sizes(8 << 10, 256 << 10, 256 << 10),
    4: Sizes(8 << 10, 128 << 10, 256 << 10),
    8: Sizes(4 << 10, 64 << 10, 128 << 10),
}
"""By number of ranks; a number between two rows takes the row above it. Only 2 is measured, by ``bench comm``."""
MANY = Sizes(2 << 10, 16 << 10, 16 << 10)


def sizes_for(ranks: int, limit_bytes: int) -> Sizes | str:
    """The measured sizes, blocks halved until the segment fits; or a sentence saying that it cannot."""
    sizes = next((row for most, row in sorted(MEASURED.items()) if ranks <= most), MANY)
    while _total(ranks, sizes) > limit_bytes:
        smaller = Sizes(
            max(512, sizes.inline_bytes // 2),
            max(LEAST_BLOCK, sizes.block_bytes // 2),
            max(LEAST_BLOCK, sizes.ring_bytes // 2),
        )
        if smaller == sizes:
            need = _total(ranks, sizes)
            return f"a segment of {ranks} ranks takes at least {need} bytes, limit_bytes={limit_bytes} allows fewer"
        sizes = smaller
    return sizes


def _total(ranks: int, sizes: Sizes) -> int:
    return _C.ShmChannel.total_bytes((ranks, sizes.inline_bytes, sizes.block_bytes, sizes.ring_bytes))
