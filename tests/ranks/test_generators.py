"""Every generator under mpirun: the same losses and weights as 1F1B on the same mesh."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from generator_cases import Run
from harness import ship
from triloom.schedules import NAMED

SELECTION = {
    2: (Run("gpt2", pp=2, microbatches=5), ("interleaved", "zb_h1", "zb_v")),
    3: (Run("llama", pp=3, microbatches=2), ("looped_bfs", "v_min", "dualpipe_v")),
    4: (Run("llama", dp=2, pp=2, microbatches=3), ("gpipe", "zb_h2", "v_half")),
}
"""By ranks: dropout and more microbatches than ranks; ties and fewer; ties and sharded optimizer state."""


def test_every_generator_runs_on_some_mesh() -> None:
    chosen = {name for _, names in SELECTION.values() for name in names}
    assert chosen == set(NAMED) - {"forward", "1f1b"}


@pytest.mark.parametrize("ranks", SELECTION)
def test_same_bits_as_1f1b(ranks: int) -> None:
    run, names = SELECTION[ranks]
    cases = [{"run": asdict(run), "schedule": name} for name in names]
    for per_rank in ship(ranks, "tests/ranks/cases_generators.py:run", cases, launch=300):
        assert all(losses == per_rank[0] for losses in per_rank)
