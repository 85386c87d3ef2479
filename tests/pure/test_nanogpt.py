"""nanoGPT's CPU settings against a plain PyTorch loop, on every mesh of two ranks."""

from __future__ import annotations

import _pydecimal
from pathlib import Path

import pytest

from triloom import boot
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom_bench.nanogpt import MESHES, TARGET, ours, plain


@pytest.mark.parametrize(
    ("steps", "path", "most"),
    [
        # So early only rounding separates the two: a wrong learning rate or decay shows in the fourth digit.
        pytest.param(10, _pydecimal.__file__, 1e-5, id="10 steps"),
        pytest.param(1000, None, TARGET, id="1000 steps", marks=pytest.mark.full),
    ],
)
def test_the_validation_loss_is_that_of_a_plain_loop(tmp_path: Path, steps: int, path: str | None, most: float) -> None:
    def run(mesh: tuple[str, ...]) -> list[float]:
        def rank(group: Group) -> float:
            world = boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=group.rank)
            return ours(world, steps, tmp_path, mesh, path)

        return run_threads(2 if mesh else 1, rank, deadline=300.0 + 3.0 * steps)

    reference = plain(boot.init(hooks=False, threads=1, device="cpu", launcher="one"), steps, tmp_path, path)
    for name, mesh in MESHES.items():
        for loss in run(mesh):
            assert loss == pytest.approx(reference, abs=most), name
    assert reference < 4.5 - steps / 500, "it learns: a uniform guess is at least ln 91 = 4.5"
