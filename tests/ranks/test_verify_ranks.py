"""Under mpirun, in one launch of four ranks: ``triloom verify`` on parts of the world, and Hugging Face folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import launch, ship
from hf_cases import their_loss, theirs

transformers = pytest.importorskip("transformers")

TINY = (
    "--model.layers 2 --model.hidden 16 --model.heads 2 --model.seq 16 --train.batch 12 --train.threads 1 "
    "--train.eval_batches 1"
)
PAIRS: list[tuple[str, str | None, bool]] = [
    ("--parallel.tp 2 --parallel.pp 2 --parallel.sequence", None, False),
    ("--parallel.dp 3", None, False),
    ("--parallel.dp 2 --placement.name zero3", "--parallel.pp 4", False),
    ("--parallel.dp 2 --parallel.pp 2", "--parallel.pp 2 --schedule.kind gpipe --placement.name zero0", True),
]
"""First run, second run (None: one rank), and whether every bit must be equal. The world has four ranks."""


def test_verify_and_conversion_on_four_ranks(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    words = f"{TINY} --data.path {text}"
    cases: list[dict[str, Any]] = [
        {"what": "verified", "case": {"first": f"{words} {a}", "second": b and f"{words} {b}"}} for a, b, _ in PAIRS
    ]
    models = {which: theirs(which) for which in ("llama", "gpt2")}
    for which, model in models.items():
        model.save_pretrained(tmp_path / which)
        mesh = {"mesh": {"tp": 2, "pp": 2}, "options": {"sequence_parallel": which == "llama"}}
        paths = {"folder": str(tmp_path / which), "out": str(tmp_path / f"{which} out")}
        cases.append({"what": "through", "case": {**paths, **mesh}})
    results = ship(4, "tests/ranks/cases_verify.py:run", cases, launch=200, deadline=60)

    for (_, _, bitwise), ranks in zip(PAIRS, results, strict=False):
        assert [code for code, _ in ranks] == [0, 0, 0, 0]
        assert [said for _, said in ranks[1:]] == ["", "", ""]
        report = ranks[0][1]
        assert report["equal"] and report["tolerance"]["bitwise"] == bitwise
        assert [run["dtype"] for run in report["runs"]] == (["float32"] * 2 if bitwise else ["float64"] * 2)
        if bitwise:
            assert all(d["same"] for d in report["tensors"])

    for (which, model), ranks in zip(models.items(), results[len(PAIRS) :], strict=True):
        loss, grads = their_loss(model)
        rel = 1e-5 if which == "llama" else 1e-9
        for got in ranks:
            assert got["loss"] == pytest.approx(loss, rel=rel)
            assert got["norms"] == pytest.approx({n: float(g.norm()) for n, g in grads.items()}, rel=10 * rel)
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{which} out", dtype=torch.float64)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), back.parameters(), strict=True))


def test_what_is_refused_is_told_once() -> None:
    done = launch(2, [sys.executable, "-m", "triloom", "verify", "--parallel.tp", "2", "--against", "--optim.lr", "1"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("the two runs are not the same training: optim.lr = 0.001 and 1.0") == 1
    assert "Traceback" not in done.stderr and "uncaught" not in done.stderr
