"""``triloom verify``: two arrangements that are equal, mistakes that are found and named, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from triloom.arrangements import QUANTISED, SHARES, alone, check_pair, in_float64, is_bitwise, tolerance
from triloom.cli import main
from triloom.commands.verify import split_keys
from triloom.compare import Tolerance, Trace, compare
from triloom.config import load
from triloom.errors import ConfigError
from triloom.parallel.reduction import Exact
from triloom.parallel.sharded import ShardedState
from triloom.plan import Plan, make_plan

TINY = """
[model]
layers = 2
hidden = 16
heads = 2
seq = 16
[train]
batch = 8
threads = 1
eval_batches = 1
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    path = tmp_path / "tiny.toml"
    path.write_text(f"{TINY}[data]\npath = '{text}'\n")
    return str(path)


def said(config: str, words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["verify", "--config", config, *words.split()])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "words",
    [
        "--parallel.tp 2 --parallel.pp 2 --parallel.sequence",
        "--parallel.dp 2 --model.shape gpt2 --placement.name zero3 --optim.kind lion",
        "--parallel.dp 2 --dtype own",
        "--parallel.tp 2 --dtype own --train.dtype float16",
        "--ranks 3 --train.batch 9 --optim.kind adafactor",
        "--parallel.tp 2 --against --parallel.tp 1 --parallel.pp 2",
    ],
)
def test_meshes_equal_one_rank_and_each_other(config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(config, f"--json {words}", capsys)
    report = json.loads(out)
    assert code == 0 and report["equal"] and not report["problems"]
    assert not report["tolerance"]["bitwise"]
    dtype = "float16" if "float16" in words else "float32" if "own" in words else "float64"
    assert [run["dtype"] for run in report["runs"]] == [dtype, dtype]
    assert len(report["losses"]) == 3 and report["losses"][0]["one"] == pytest.approx(5.5, abs=0.2)
    assert {tuple(d["shape"]) for d in report["tensors"]} >= {(256, 16), (16,)}


@pytest.mark.parametrize(
    "words",
    [
        "--parallel.pp 2 --against --schedule.kind gpipe --placement.name zero0",
        "--parallel.dp 2 --placement.cadence microbatch --against --placement.name zero3 --placement.bucket_mb 0.01",
        "--placement.activations recompute",
    ],
)
def test_schedule_and_placement_change_no_bit(config: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(config, f"--json {words}", capsys)
    report = json.loads(out)
    assert code == 0 and report["tolerance"]["bitwise"] and report["runs"][0]["dtype"] == "float32"
    assert all(d["same"] for d in report["tensors"])


def test_the_text_says_what_was_compared(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(config, "--parallel.tp 2 --steps 2", capsys)
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith(
        "run 1: dp=1 x pp=1 x tp=2, 1f1b, 1 microbatches, zero1, float64; replicas are equal (5 "
    )
    assert lines[1] == "run 2: dp=1 x pp=1 x tp=1, 1f1b, 1 microbatches, zero0, float64"
    assert lines[2].startswith("must be equal: loss 1e-10, gradients 1e-08, weights 1e-06 (sums are added in another")
    assert lines[-2] == "7 tensors that are no further apart are not shown (--all)"
    assert lines[-1] == "equal: loss, gradients and weights of 15 tensors"


def test_a_forgotten_sum_is_found_in_the_tensors_it_concerns(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the norms under sequence parallelism are terms of a sum over tp."""
    monkeypatch.setattr(ShardedState, "_sum_partial", lambda self, state: None)
    code, out, _ = said(config, "--json --parallel.tp 2 --parallel.sequence", capsys)
    report = json.loads(out)
    assert code == 1 and not report["equal"]
    wrong = {d["name"] for d in report["tensors"] if d["grads"] > 1e-2}
    assert wrong == {d["name"] for d in report["tensors"] if "norm" in d["name"]}
    code, out, _ = said(config, "--parallel.tp 2 --parallel.sequence", capsys)
    assert code == 1 and "NOT EQUAL: " in out and out.splitlines()[-1].startswith("what to do: ")


def test_ranks_that_drift_apart_are_told(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the reduction over dp every rank of zero0 trains on its own samples."""

    class Nothing(Exact):
        def post(self, group: Any, *rest: Any) -> Any:
            return super().post(group, *rest) if group.size == 1 else None

    monkeypatch.setattr("triloom.train.REDUCTIONS", {"exact": Nothing})
    monkeypatch.setattr(ShardedState, "wait_reduced", lambda self: None)
    code, out, _ = said(config, "--parallel.dp 2 --placement.name zero0", capsys)
    assert code == 1 and "replicas differ" in out.splitlines()[0]
    assert "NOT EQUAL: ranks of run 1 differ in embed.tokens.weight (over dp): rank 0: " in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--against --optim.lr 1",
            "optim.lr = 0.001 and 1.0, optim.min_lr = 0.0001 and 0.1; let them differ in parallel, ",
        ),
        ("--parallel.dp 2 --placement.reduction topk", "placement.reduction = topk changes the gradient on purpose"),
        ("--step 3", "did you mean 'steps'"),
        ("--against --steps 3", "'--steps' is not a key of the second run; give it before --against"),
        ("--parallel.tp 3", "tp=3 does not divide heads=2"),
        ("--model.layer 3", "did you mean 'model.layers'?"),
    ],
)
def test_what_is_refused(config: str, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(config, words, capsys)
    assert (code, out) == (2, "") and message in err


def test_loss_that_is_not_finite_ends_it(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--parallel.dp 2 --optim.lr 1e305 --optim.clip none --optim.warmup 0 --optim.max_skips 0"
    code, _, err = said(config, words, capsys)
    assert code == 1 and "the run on dp=2 x pp=1 x tp=1 ended: " in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--help"]) == 0
    assert "--steps INT" in capsys.readouterr().out


# ---------------------------------------------------------------- arrangements


def plan(words: str, ranks: int = 1) -> Plan:
    return make_plan(load(words.split()).config, ranks, data_vocab=256)


def test_the_second_run_is_one_rank_with_the_same_microbatches() -> None:
    one = plan("--parallel.pp 2 --schedule.kind zb_h1 --placement.name zero3 --train.batch 16", 4)
    two = make_plan(alone(one), 1, data_vocab=256)
    assert (two.mesh.size, two.microbatches, two.config.placement.name) == (1, 8, "zero0")
    found = check_pair(one, two)
    assert {"parallel.pp", "schedule.kind", "placement.name", "mesh"} <= set(found) and not is_bitwise(found)


@pytest.mark.parametrize(
    ("one", "two", "ranks", "bitwise"),
    [
        ("--parallel.pp 2", "--parallel.pp 2 --schedule.kind gpipe", 2, True),
        ("--parallel.dp 2", "", 2, True),
        ("--placement.name zero1", "--placement.name zero2", 2, False),
        ("--placement.name zero1 --placement.cadence microbatch", "--placement.name zero3", 2, True),
        ("--placement.name zero3", "--placement.name zero3 --placement.prefetch 3", 2, True),
        ("--schedule.microbatches 2", "--schedule.microbatches 4", 1, False),
        ("--placement.name zero3", "--placement.name zero3 --placement.shard_ranks 1", 2, False),
        ("--parallel.tp 2", "--parallel.pp 2", 2, False),
    ],
)
def test_what_must_be_equal_bit_for_bit(one: str, two: str, ranks: int, bitwise: bool) -> None:
    a, b = plan(one, ranks), plan(two, ranks)
    found = check_pair(a, b)
    assert is_bitwise(found) == bitwise == tolerance(a, found).exact


def test_the_coarsest_numbers_set_the_tolerance() -> None:
    def shares(words: str) -> tuple[float, float, float]:
        t = tolerance(plan(words), {"parallel.tp": ("1", "2")})
        return t.loss, t.grads, t.weights

    assert shares("") == SHARES["float32"]
    assert shares("--train.dtype float64") == SHARES["float64"]
    assert shares("--train.dtype float64 --placement.grad_dtype bfloat16") == SHARES["bfloat16"]
    assert shares("--train.dtype float16") == SHARES["float16"]
    for rounded in ("--optim.kind adamw8bit --train.dtype float64", "--placement.state_dtype bfloat16"):
        assert shares(rounded)[0] == QUANTISED[0] and shares(rounded)[2] == QUANTISED[2]
    rough = "--train.dtype bfloat16 --placement.grad_dtype bfloat16 --placement.rounding kahan"
    wide = in_float64(plan(f"{rough} --placement.state_dtype bfloat16").config)
    assert (wide.train.dtype, wide.placement) == ("float64", plan("").config.placement)


def test_options_and_keys_are_told_apart() -> None:
    own, keys = split_keys(["--steps", "3", "--model.layers", "2", "--json", "--parallel.sequence", "--data.path=a.b"])
    assert own == ["--steps", "3", "--json"]
    assert keys == ["--model.layers", "2", "--parallel.sequence", "--data.path=a.b"]


# ---------------------------------------------------------------- differences

NOTHING, LOOSE = Tolerance(0, 0, 0, 1e-16, ""), Tolerance(1e-9, 1e-6, 1e-3, 1e-16, "")


def traced(**change: torch.Tensor) -> Trace:
    """Two tensors, one of which has a gradient of rounding noise only; ``change`` is added."""
    draw = torch.Generator().manual_seed(1)
    grads = {"a": torch.randn(50, generator=draw).double(), "noise": torch.randn(9, generator=draw).double() * 1e-17}
    start = {n: torch.randn(g.shape, generator=draw).double() for n, g in grads.items()}
    weights = {n: start[n] - 1e-3 * g.sign() for n, g in grads.items()}
    return Trace(
        (2.0, 1.5),
        start,
        {n: g + change.get(f"grad_{n}", 0.0) for n, g in grads.items()},
        {n: w + change.get(n, 0.0) for n, w in weights.items()},
        0,
    )


def test_noise_may_go_either_way_and_nothing_else() -> None:
    assert compare(traced(), traced(), NOTHING).equal
    flipped = torch.zeros(9).double()
    flipped[4] = 2e-3
    result = compare(traced(noise=flipped, grad_noise=flipped * 1e-14), traced(), LOOSE)
    assert result.equal and result.tensors[1].noise == 1 and not result.tensors[1].same
    assert not compare(traced(noise=flipped), traced(), NOTHING).equal
    one = torch.zeros(50).double()
    one[7] = 1e-4
    problems = compare(traced(a=one), traced(), LOOSE).problems
    assert len(problems) == 1 and problems[0].startswith("weights of a by 0.01")
    assert compare(traced(a=one * 1e-3), traced(), LOOSE).equal
    assert compare(traced(grad_a=one), traced(), LOOSE).problems[0].startswith("gradient of a by ")


def test_nan_and_missing_tensors_are_never_equal() -> None:
    bad = torch.full((50,), math.nan).double()
    for allowed in (LOOSE, NOTHING):
        assert not compare(traced(a=bad), traced(), allowed).equal
        assert not compare(traced(a=bad), traced(a=bad), allowed).equal
    one = traced()
    less = Trace(one.losses, one.start, {"a": one.grads["a"]}, {"a": one.weights["a"]}, 0)
    assert compare(less, one, LOOSE).problems == ("noise is in one of the two models only",)
    losses = Trace((2.0, math.nan), one.start, one.grads, one.weights, 0)
    assert compare(losses, losses, LOOSE).problems[0].startswith("loss of step 1: nan and nan")


def test_a_mixture_of_dtypes_is_refused_in_one_place(config: str) -> None:
    with pytest.raises(ConfigError, match="train.dtype = float32 and float64"):
        check_pair(plan(""), plan("--train.dtype float64"))
