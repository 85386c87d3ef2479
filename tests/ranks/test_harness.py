"""The runner itself: it must fail, and say why, for everything that can go wrong on a rank."""

from __future__ import annotations

import sys

import pytest
from hypothesis import strategies as st

from harness import draw, launch, ship
from harness.cases import Case, run_cases

SCRATCH = """
import os, time
import pytest
import torch

@pytest.mark.ranks(2)
def test_passes(world, tmp_path):
    x = torch.ones(3)
    world.group.all_reduce(x).wait()
    assert x.tolist() == [2.0] * 3

@pytest.mark.ranks(2)
def test_fails_on_one(world):
    assert world.rank == 0, "only the other rank is right"

@pytest.mark.ranks(2)
def test_skipped(world):
    pytest.skip("for a reason")

@pytest.mark.ranks(2)
def test_dies(world):
    if world.rank == 1:
        os._exit(3)
    world.group.barrier().wait()

@pytest.mark.ranks(2)
def test_hangs(world):
    while world.rank == 1:
        time.sleep(0.1)

@pytest.mark.ranks(2)
def test_one_never_comes(world):
    if world.rank == 0:
        world.group.barrier().wait(1.0)

@pytest.mark.ranks(2)
def test_works_after_all_that(world):
    world.group.barrier().wait()
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("scratch")
    file = folder / "test_scratch.py"
    file.write_text(SCRATCH)
    names = [line[4:].partition("(")[0] for line in SCRATCH.splitlines() if line.startswith("def ")]
    timeouts = {f"test_scratch.py::{name}[2ranks]": 3.0 for name in names}
    spec = {"mode": "tests", "file": str(file), "root": str(folder), "deadline": 10.0, "timeouts": timeouts}
    done = run_cases(2, spec, launch_timeout=60)
    return {key.partition("::")[2].partition("[")[0]: case for key, case in done.items()}


@pytest.mark.parametrize(
    ("name", "outcome", "says"),
    [
        ("test_passes", "passed", ""),
        ("test_fails_on_one", "failed", "rank 1 of 2 failed first"),
        ("test_fails_on_one", "failed", "passed on ranks [0]"),
        ("test_fails_on_one", "failed", "only the other rank is right"),
        ("test_skipped", "skipped", "for a reason"),
        ("test_dies", "failed", "ended with exit code 3"),
        ("test_hangs", "failed", "ranks [1] of 2 did not finish this case"),
        ("test_hangs", "failed", "in test_hangs"),  # the stack of the stuck rank
        ("test_one_never_comes", "failed", "rank 1 had not arrived"),
        ("test_works_after_all_that", "passed", ""),
    ],
)
def test_outcomes(cases: dict[str, Case], name: str, outcome: str, says: str) -> None:
    case = cases[name]
    assert case.outcome == outcome, case.text()
    assert says in case.text()


def test_ship_returns_every_rank_and_names_the_failing_case() -> None:
    drawn = draw(st.integers(0, 1000), 20)
    assert drawn == draw(st.integers(0, 1000), 20) and len(set(drawn)) > 5
    target = "tests/ranks/cases_harness.py:echo"
    assert ship(2, target, drawn) == [[[0, 2, case], [1, 2, case]] for case in drawn]
    with pytest.raises(
        AssertionError, match=r'case "fail":\nrank 0 of 1 failed first:\n(.|\n)*ValueError: told to fail'
    ):
        ship(1, target, ["fine", "fail"])
    with pytest.raises(ValueError, match=r"target must be"):
        ship(2, "tests/ranks/cases_harness.py", drawn)


def test_launch_kills_the_whole_tree_at_its_deadline() -> None:
    """Also grandchildren that left the group and the session."""
    program = "import os, subprocess, time; subprocess.Popen(['sleep', '77'], start_new_session=True); time.sleep(77)"
    result = launch(2, [sys.executable, "-c", program], timeout=2.0)
    assert result.timed_out and not result.leftovers
    assert result.seconds < 20


def test_launch_names_what_is_left_behind() -> None:
    program = (
        "import subprocess as s; s.Popen(['sleep', '77'], start_new_session=True, stdout=s.DEVNULL, stderr=s.DEVNULL)"
    )
    result = launch(1, [sys.executable, "-c", program], timeout=20.0)
    assert result.returncode == 0
    assert [left.partition(": ")[2].strip() for left in result.leftovers] == ["sleep 77"]
