"""The kernels' bench among the others: two operations here, and what a GPU's rows become."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from triloom_bench.__main__ import BENCHES
from triloom_bench.harness import table
from triloom_bench.kernels import as_result
from triloom_bench.launch import Bench, Launch, run


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_two_operations_run_and_are_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench = Bench("two of them", (Launch(1, "kernels", ("rms_norm", "swiglu")),))
    assert run("kernels", bench, rounds=7, out=tmp_path, timeout=100)
    (launch,) = json.loads((tmp_path / "kernels.json").read_text())["launches"]
    assert [(row["setup"]["op"], row["setup"]["direction"]) for row in launch["results"]] == [
        (op, direction) for op in ("rms_norm", "swiglu") for direction in ("forward", "backward")
    ]
    for row in launch["results"]:
        assert set(row["contenders"]) == {"eager"} and row["contenders"]["eager"]["rate"] > 0
        assert row["setup"]["notes"] == ["no GPU here: the eager references alone, on the CPU and at small sizes"]
    assert "swiglu backward, 256 x 64, cpu   (7 rounds, medians)" in capfd.readouterr().out


def test_an_unknown_operation_fails_the_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bench = Bench("none", (Launch(1, "kernels", ("softmin",)),))
    assert not run("kernels", bench, rounds=7, out=tmp_path, timeout=100)
    assert "unknown operation softmin; there are rms_norm" in capfd.readouterr().err


def test_a_row_of_a_gpu_becomes_a_table() -> None:
    row = {
        "op": "swiglu", "size": "8 x 4", "direction": "forward", "unit": "B/s", "share_of_ceiling": 0.5,
        "seconds": {"triloom": 1.0, "torch.compile": 2.0, "torch": 3.0},
        "rate": {"triloom": 6e9, "torch.compile": 3e9, "torch": 2e9},
        "faster_than": {"torch.compile": 2.0, "torch": 3.0},
        "spread": {"triloom": [0.5, 2.0], "torch.compile": [1.0, 4.0], "torch": [3.0, 3.0]},
    }  # fmt: skip
    result = as_result(row, {"device": "a GPU", "torch": "2", "rounds": 9, "ceilings": {}, "notes": []}).as_json()
    assert result["contenders"]["triloom"] == {"median_s": 1.0, "min_s": 0.5, "max_s": 2.0, "rate": 6.0}
    compiled, eager = result["ratios"]
    assert (compiled["min"], compiled["median"], compiled["max"], compiled["met"]) == (0.5, 2.0, 8.0, True)
    assert eager["target"] is None
    assert "triloom / torch.compile = 2.000  (0.50 .. 8.00)  target 1.00: met" in table(result)
    assert "50.0% of the ceiling" in table(result)


def test_it_is_a_name_of_the_command_line() -> None:
    assert BENCHES["kernels"].launches[0].command(9)[1:] == ["-m", "triloom_bench.kernels", "--rounds", "9"]
    assert BENCHES["kernels"].launches[0].command(9)[0] == sys.executable
