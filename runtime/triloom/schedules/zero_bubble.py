"""Zero-bubble schedules: weight gradients are computed apart, where there is nothing else to do. Pure.

Qi et al., Zero Bubble Pipeline Parallelism, arXiv 2401.10241. Rank r runs k phases; where the paper
draws them for many microbatches, a smaller number leaves out what goes beyond the last one.
"""

from __future__ import annotations

from collections.abc import Callable

from ..actions import Program
from .base import Phase, chain, check_sizes, chunks_of, v_shaped, write


def zb_h1(ranks: int, microbatches: int) -> Program:
    """1F1B's order and memory, W delayed by as many microbatches as there are ranks above (figure 2, section 2.3).

    Forwards in flight and delayed Ws are at most p together, as in 1F1B. Bubble (p-1)(F+B-W), where
    1F1B has (p-1)(F+B+W).
    """
    check_sizes("zb_h1", ranks, microbatches)
    p, m = ranks, max(microbatches, ranks)
    return _chain_program(
        "zb_h1",
        ranks,
        microbatches,
        lambda r: (("F", p - 1 - r), ("F B", r), ("F B W", m - p + 1), ("B W", p - 1 - r)),
    )


def zb_h2(ranks: int, microbatches: int) -> Program:
    """Forwards fill the bubble before the first B, Ws the one after the last (figure 3).

    2p - 1 microbatches are held, nearly twice 1F1B's; every rank works without a gap from its first
    action to its last when F = B = W.
    """
    check_sizes("zb_h2", ranks, microbatches)
    p, m = ranks, max(microbatches, 2 * ranks - 1)
    return _chain_program(
        "zb_h2",
        ranks,
        microbatches,
        lambda r: (("F", 2 * (p - 1 - r)), ("F B", 2 * r), ("F B W", m - 2 * p + 2), ("B W", 2 * (p - 1 - r))),
    )


def _chain_program(name: str, ranks: int, microbatches: int, phases: Callable[[int], tuple[Phase, ...]]) -> Program:
    rows = tuple(write((r,), microbatches, *phases(r)) for r in range(ranks))
    return Program(rows, chain(ranks), microbatches, name)


def zb_v(ranks: int, microbatches: int) -> Program:
    """Two stages a rank in a V (section 6, figure 8): the first rank starts the backward itself.

    No bubble when F = B = W, at 1F1B's memory: 2p halves of a microbatch on every rank.
    """
    check_sizes("zb_v", ranks, microbatches)
    p, m, where = ranks, max(microbatches, 2 * ranks - 1), v_shaped(ranks)
    rows = tuple(
        write(
            chunks_of(where, r),
            microbatches,
            ("F0", 2 * (p - r) - 1),
            ("F1 F0", r),
            ("F1 B1 W1", p - r),
            ("F0 B0 W0 F1 B1 W1", m - p),
            ("B0 B1", r),
            ("B0 W0", p - r),
        )
        for r in range(p)
    )
    return Program(rows, where, microbatches, "zb_v")


def dualpipe_v(ranks: int, microbatches: int) -> Program:
    """DualPipe on a V: a forward of one chunk runs beside a backward of the other (DeepSeek, DualPipeV, 2025).

    DualPipe (arXiv 2412.19437, section 3.2.1) cut in half by Sea AI Lab ("cut-in-half"): half the ranks
    and no second copy of the parameters. The eight phases of its description; F0 BW1 and F1 BW0 are
    the pairs that overlap. Ws are split off where they fill a bubble.
    """
    check_sizes("dualpipe_v", ranks, microbatches)
    p, m, where = ranks, max(microbatches, 2 * ranks), v_shaped(ranks)

    def phases(r: int) -> tuple[Phase, ...]:
        below, (pairs, odd) = p - 1 - r, divmod(r + 1, 2)
        return (
            ("F0", 2 * below),
            ("F0 F1", r + 1),
            ("B1 W1 F1", below),
            ("F0 BW1 F1 BW0", m - 2 * p + r + 1),
            ("BW1 F1 BW0", below),
            ("BW1 BW0", pairs),
            ("BW1 B0", odd),
            ("B1 B0", pairs),
            ("W B0", below),
        )

    rows = tuple(write(chunks_of(where, r), microbatches, *phases(r)) for r in range(p))
    return Program(rows, where, microbatches, "dualpipe_v")
