"""The bench of the kernels on a machine without a GPU: it says so, and runs every reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triloom_kernels.bench.cases import cases
from triloom_kernels.bench.report import plot, row_text

CPU = torch.device("cpu")


def test_all_references_run(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "triloom_kernels.bench", "--rounds", "7", "--json", str(tmp_path / "out.json")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert told.startswith("no GPU here") and result["notes"] and result["ceilings"] is None
    assert {row["op"] for row in result["rows"]} == {case.op for case in cases(CPU, small=True)}
    assert all(row["seconds"]["eager"] > 0 and row["share_of_ceiling"] is None for row in result["rows"])


def test_an_unknown_operation_is_refused() -> None:
    command = [sys.executable, "-m", "triloom_kernels.bench", "soft_max"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2 and "unknown operation soft_max; there are rms_norm" in told.stderr


def test_a_row_and_a_picture(tmp_path: Path) -> None:
    row = {
        "op": "swiglu", "size": "2 x 4", "direction": "forward", "unit": "B/s",
        "seconds": {"triloom": 1e-5, "torch": 2e-5}, "rate": {"triloom": 2e12, "torch": 1e12},
        "share_of_ceiling": 0.5, "faster_than": {"torch": 2.0},
    }  # fmt: skip
    assert "2000.0 GB/s   50.0% of the ceiling  torch x2.00" in row_text(row)
    top = {"bytes_per_s": 4e12, "flops_per_s": 1e15}
    plot({"rows": [row], "ceilings": top, "device": "a device", "torch": "2"}, tmp_path / "out.svg")
    assert "swiglu forward" in (tmp_path / "out.svg").read_text()
