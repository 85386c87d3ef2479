"""Checkpoints on ranks that are threads: every mesh to every other, exact resumption, refusals, damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

import checkpoint_cases as cases
from triloom.checkpoint import Checkpoints, found, path_of, read_manifest, verify
from triloom.checkpoint.series import Keep
from triloom.errors import ConfigError
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


FULL = pytest.mark.full


@pytest.mark.parametrize("start", ["dp2_tp2", pytest.param("one", marks=FULL), pytest.param("dp2_pp2", marks=FULL)])
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


# ---------------------------------------------------------------- series


def test_which_checkpoints_stay() -> None:
    assert Keep(last=2).spare([10, 20, 30]) == [10]
    assert Keep(last=1, every=20).spare([10, 20, 30, 40, 50]) == [10, 30]
    assert Keep(last=None).spare([1, 2, 3]) == Keep(last=5).spare([1, 2]) == []
    with pytest.raises(ConfigError, match="keep_every must be at least 1"):
        Keep(every=0)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_series_saves_when_due_and_keeps_what_it_should(tmp_path: Path, asynchronous: bool) -> None:
    leftover = tmp_path / "step-00000001.tmp-12ab"
    leftover.mkdir()
    (tmp_path / "step-1.tmp-mine").mkdir()

    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASES["dp2"])
        series = Checkpoints(engine, tmp_path, every=2, keep=1, keep_every=4, asynchronous=asynchronous)
        with series as checkpoints:
            for step in range(11):
                checkpoints.after(cases.step(engine), {"batch": step})
            assert not checkpoints.busy or asynchronous
        assert not checkpoints.busy

    run_threads(2, body)
    assert found(tmp_path) == [4, 8, 10] and not leftover.exists()
    assert (tmp_path / "step-1.tmp-mine").exists(), "not one of ours"
    assert read_manifest(path_of(tmp_path, 10)).extra == {"batch": 9}


def test_an_asynchronous_save_is_of_the_step_it_was_asked_for(tmp_path: Path) -> None:
    """Steps go on while it is written, and change everything."""

    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASES["dp2"])
        checkpoints = Checkpoints(engine, tmp_path)
        cases.steps(engine, 1)
        engine.save(tmp_path / "same")
        checkpoints.save()
        while checkpoints.busy:
            checkpoints.after(cases.step(engine))

    run_threads(2, body)
    assert cases.canonical(path_of(tmp_path, 1)) == cases.canonical(tmp_path / "same")
