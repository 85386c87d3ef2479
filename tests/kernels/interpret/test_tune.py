"""The tuner from end to end in the interpreter, with times that are made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from triloom_kernels import tuning
from triloom_kernels.tune.__main__ import main
from triloom_kernels.tune.candidates import CANDIDATES, Range, candidates
from triloom_kernels.tune.search import Tuner, compare, text, tune, tune_all
from triloom_kernels.tune.work import WORK, Extent, sizes_of
from triloom_kernels.tuning import Entry

TINY = Extent(rows=5, elements=1 << 10, heads=2, half=torch.float16, device=torch.device("cpu"))
SMALL = {"width": 32, "head_dim": 16, "vocab": 60}


def last_wins(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    return {name: [1.0 / (1 + i)] * rounds for i, name in enumerate(runs)}


def tuner(said: list[str], ranges: Mapping[str, Any] = CANDIDATES) -> Tuner:
    return Tuner(TINY, last_wins, 7, said.append, ranges)


def shrunk(op: str) -> list[tuple[Entry, list[dict[str, Any]]]]:
    """The last entry of each dtype, at sizes for the interpreter, and the first two of its candidates."""
    chosen = {entry.bounds.get("bytes"): entry for entry in tuning.entries(op, 90)}.values()
    sizes = [sizes_of(op, entry.bounds) for entry in chosen]
    small = [{name: SMALL.get(name, size) for name, size in one.items()} for one in sizes]
    return [
        (Entry(bounds, entry.options, False), candidates(op, at, CANDIDATES)[:2])
        for entry, at, bounds in zip(chosen, sizes, small, strict=True)
    ]


@pytest.mark.parametrize("op", WORK)
def test_every_table(op: str, tmp_path: Path) -> None:
    """Two candidates each: checked against eager torch, timed, written."""
    said: list[str] = []
    rows = shrunk(op)
    before = [entry for entry, _ in rows]
    ranges = {op: [Range(entry.bounds, tried) for entry, tried in rows]}
    tables = {"other": [Entry({}, {"SIZE": 1}, False)], op: before}
    tune_all(tables, [op], tuner(said, ranges), tmp_path / "out.json")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["other"] == [{"options": {"SIZE": 1}, "measured": False}]
    assert [row["measured"] for row in written[op]] == [True] * len(before)
    assert not [line for line in said if "skipped" in line], said
    for row, (entry, tried) in zip(written[op], rows, strict=True):
        others = [options for options in tried if options != dict(entry.options)]
        assert row["options"] == others[-1]


def test_tables_candidates_and_work_are_of_one_kind() -> None:
    """Every candidate names what its entry does; what is in a table is among the candidates of the tuner's own."""
    assert set(CANDIDATES) == set(WORK)
    for arch in tuning.ARCHITECTURES:
        assert set(tuning.table(arch)) == set(WORK)
        for op in WORK:
            for entry in tuning.entries(op, arch):
                found = candidates(op, sizes_of(op, entry.bounds))
                assert found and all(set(options) == set(entry.options) for options in found), (op, arch, entry)


def test_the_file_keeps_its_form() -> None:
    for arch in tuning.ARCHITECTURES:
        assert text(tuning.table(arch)) == (tuning.FOLDER / f"sm_{arch}.json").read_text()


def test_what_fails_or_is_wrong_is_skipped_and_said() -> None:
    said: list[str] = []
    good = {"SIZE": 64, "num_warps": 4, "num_stages": 1}
    ranges = {"rank_sum": [Range({}, [{**good, "SIZE": 63}])]}  # not a power of two
    (entry,) = tune("rank_sum", [Entry({}, good, False)], tuner(said, ranges))
    assert entry.options == good and entry.measured
    assert said[0].startswith("rank_sum: skipped {'SIZE': 63") and "1 of 2 timed" in said[1]
    with pytest.raises(RuntimeError, match="rank_sum: no candidate works"):
        tune("rank_sum", [Entry({}, {**good, "SIZE": 63}, False)], tuner([], ranges))
    with pytest.raises(ValueError, match="candidate .* must name SIZE, num_warps, num_stages"):
        tune("rank_sum", [Entry({}, good, False)], tuner([], {"rank_sum": [Range({}, [{"ROWS": 1}])]}))
    with pytest.raises(ValueError, match="result 0 is off by 1"):
        compare((torch.ones(3),), (torch.zeros(3),))


def test_a_little_faster_is_noise() -> None:
    def close(runs: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, list[float]]:
        return {name: [1.0 - 0.005 * i] * rounds for i, name in enumerate(runs)}

    now = {"SIZE": 64, "num_warps": 4, "num_stages": 1}
    ranges = {"rank_sum": [Range({}, [{**now, "SIZE": 128}])]}
    (entry,) = tune("rank_sum", [Entry({}, now, False)], Tuner(TINY, close, 7, lambda line: None, ranges))
    assert entry.options == now


def test_a_trial_is_of_one_table_and_ends() -> None:
    usual = tuning.options("pack", 90)
    with tuning.trying("pack", {"SIZE": 1}) as trial:
        assert tuning.options("pack", 90) == {"SIZE": 1}
        assert tuning.options("take", 90) != {"SIZE": 1}
    assert trial.asked == 1
    assert tuning.options("pack", 90) == usual


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pack"]) == 1
    assert "no GPU here" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["packs"])
    assert "unknown table packs; there are norm_forward" in capsys.readouterr().err
