"""Checkpoints on ranks that are threads: every mesh to every other, exact resumption, refusals, damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import checkpoint_cases as cases
from triloom.checkpoint import read_manifest, verify
from triloom.groups.base import Group
from triloom.groups.threads import run_threads

CASES = cases.variants()


def trained(name: str, folder: Path, count: int = 3) -> None:
    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASES[name])
        cases.steps(engine, count)
        engine.save(folder, {"said": name})
        engine.close()

    run_threads(CASES[name].ranks, body)


def moved(name: str, source: Path, target: Path) -> None:
    """Load on another mesh, and save what was loaded."""

    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASES[name])
        cases.steps(engine, 1)  # everything differs from what is loaded
        engine.load(source)
        engine.save(target)
        engine.close()

    run_threads(CASES[name].ranks, body)


@pytest.mark.parametrize("start", ["dp2_tp2", "one", "dp2_pp2"])
def test_every_mesh_loads_what_any_other_saved(tmp_path: Path, start: str) -> None:
    trained(start, tmp_path / start)
    want = cases.canonical(tmp_path / start)
    assert {"params/", "exp_avg/", "exp_avg_sq/"} <= {n[: n.find("/") + 1] for n in want}
    last = tmp_path / start
    for name in ("one", "tp4", "pp2", "dp3", "dp4", start):
        moved(name, last, tmp_path / f"to-{name}")
        last = tmp_path / f"to-{name}"
        assert cases.canonical(last) == want, name
        verify(last)


@pytest.mark.parametrize("name", ["one", "dp2", "tp2", "pp2", "dp2_pp2"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    def whole(world: Group) -> cases.Steps:
        engine = cases.make_engine(world, CASES[name])
        cases.steps(engine, 3)
        engine.save(tmp_path / "middle")
        rest = cases.steps(engine, 3)
        engine.save(tmp_path / "end")
        return rest

    def resumed(world: Group) -> cases.Steps:
        engine = cases.make_engine(world, CASES[name])
        cases.steps(engine, 1)
        restored = engine.load(tmp_path / "middle")
        assert (restored.step, engine.steps) == (3, 3)
        rest = cases.steps(engine, 3)
        engine.save(tmp_path / "again")
        return rest

    assert run_threads(CASES[name].ranks, whole) == run_threads(CASES[name].ranks, resumed)
    assert cases.canonical(tmp_path / "again", own=True) == cases.canonical(tmp_path / "end", own=True)
