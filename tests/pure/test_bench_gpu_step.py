"""The bench of training steps on a GPU: its whole way at a tiny size on the CPU, and its figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from triloom.models import llama
from triloom_bench import gpu_step as bench
from triloom_bench.peers.llama import Shape

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_tiny_model_goes_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu_step", "--device", "cpu", "--size", "tiny", "--json", str(out)])
    bench.main()
    (row,) = json.loads(out.read_text())
    assert set(row["contenders"]) == set(row["setup"]["first_losses"]) == {"triloom", "torch"}
    ours, theirs = (row["setup"]["first_losses"][who] for who in ("triloom", "torch"))
    assert ours == pytest.approx(theirs, rel=2e-4) and ours[-1] < ours[0]
    assert row["setup"]["mfu"] == {} and row["ratios"][0]["target"] is None
    assert "for the path, not for figures" in capsys.readouterr().out


def test_sides_that_train_apart_are_not_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LR", 0.2)  # ours alone: the peer has the rate of work.py
    with pytest.raises(ValueError, match="do not train alike"):
        bench.measure("tiny", CPU, 7, None)


def test_gradients_and_masters_are_fp32() -> None:
    engine = bench.ours(bench.SIZES["tiny"].shape, CPU)
    assert {t.dtype for t in engine.full_state("params").values()} == {torch.bfloat16}
    assert {t.dtype for t in engine.full_state("master").values()} == {torch.float32}
    assert {bucket.grads.tensor.dtype for bucket in engine.state.buckets} == {torch.float32}


def test_parameters_are_the_models() -> None:
    for size in bench.SIZES.values():
        s = size.shape
        named = {"vocab": s.vocab, "hidden": s.hidden, "layers": s.layers, "heads": s.heads, "kv_heads": s.kv_heads}
        assert bench.parameters(s)[0] == llama(**named, ffn=s.ffn, max_seq=s.seq).parameters
    assert 110e6 < bench.parameters(bench.SIZES["125m"].shape)[0] < 140e6
    assert 0.95e9 < bench.parameters(bench.SIZES["1b"].shape)[0] < 1.1e9
    assert all(size.seq == 2048 for name, size in bench.SIZES.items() if name != "tiny")


def test_flops_are_those_of_the_papers_formula() -> None:
    """Narayanan et al.: 72 B s l h^2 (1 + s / (6 h) + V / (12 l h)), where the blocks have 12 h^2 entries."""
    h, layers, s, v = 96, 5, 128, 1000
    shape = Shape(v, h, layers, 8, 8, 8 * h // 3, s)
    assert bench.flops_of_token(shape) == pytest.approx(72 * layers * h * h * (1 + s / (6 * h) + v / (12 * layers * h)))
    rate = 1e12 / bench.flops_of_token(shape)
    assert bench.shares({"triloom": rate}, shape, 2e12) == {"triloom": pytest.approx(0.5)}


def test_peaks_by_name() -> None:
    assert bench.peak_of("NVIDIA H200") == 989e12
    assert bench.peak_of("NVIDIA H100 PCIe") == 756e12
    assert bench.peak_of("a new one") is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without a GPU")
def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["gpu_step", "--json", str(out)])
    bench.main()
    assert "no GPU on this machine: no step was measured" in capsys.readouterr().out
    assert json.loads(out.read_text()) == []
