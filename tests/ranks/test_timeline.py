"""A measured run on real ranks: clocks, a span for every action, the bubble taken apart; programs from files."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest

from harness import launch
from triloom import cli
from triloom.actions import COMPUTE
from triloom.boot import World
from triloom.config import load as load_config
from triloom.groups.objects import broadcast_object
from triloom.measured import BEGIN, END, UNTIL, WAITED
from triloom.runlog import read_metrics
from triloom.spans import clock_offsets
from triloom.trace import load
from triloom.train import train

TINY = """
[model]
layers = 2
hidden = 16
heads = 2
seq = 16
[train]
batch = 8
steps = 5
threads = 1
eval_batches = 1
deadline = 30
[schedule]
microbatches = 4
[run]
plot = false
overwrite = true
dir = {folder!r}
[data]
path = {path!r}
"""


def tiny(folder: Path) -> Path:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    path = folder / "tiny.toml"
    path.write_text(TINY.format(folder=str(folder / "run"), path=str(text)))
    return path


def run(world: World, tmp_path: Path, *words: str) -> Path:
    """Train; the run directory."""
    train(load_config(words, tiny(tmp_path)).config, world, out=io.StringIO())
    return tmp_path / "run"


@pytest.mark.ranks(2, 4)
def test_ranks_of_one_host_have_one_clock(world: World) -> None:
    """perf_counter is the same clock for all processes of a Linux host, so the true offset is 0."""
    for offsets in (clock_offsets(world.group), clock_offsets(world.group)):
        assert offsets.add_ns[0] == 0
        assert all(abs(add) <= error for add, error in zip(offsets.add_ns, offsets.error_ns, strict=True))
        assert max(offsets.error_ns) < 20_000_000
        assert abs(time.perf_counter_ns() - offsets.at_ns) < 10_000_000_000


@pytest.mark.ranks(2)
def test_every_action_of_the_last_steps_has_a_span(world: World, tmp_path: Path) -> None:
    folder = run(world, tmp_path, "--parallel.pp", "2", "--run.timeline", "2")
    if world.rank:
        assert not (folder / "timeline.json").exists()
        return
    trace = load(folder)
    m = trace.measurement
    assert [s.number for s in trace.steps] == [3, 4]
    assert len(trace.clock_error_us) == 2
    error = max(trace.clock_error_us) * 1e3
    for step in trace.steps:
        for rank, seat in enumerate(m.seats):
            actions = m.program.ranks[seat.coord]
            rows = step.times[rank, : len(actions)]
            assert (rows[:, BEGIN] > 0).sum() >= len(actions) - 1, "but for the very first, which is at 0"
            assert (rows[:, END] > rows[:, BEGIN]).all()
            assert (rows[1:, BEGIN] >= rows[:-1, END]).all(), "one after the other"
            assert (rows[:, WAITED] <= rows[:, END] - rows[:, BEGIN]).all()
            waited = [a for a, cells in zip(actions, rows, strict=True) if cells[WAITED]]
            assert waited and all(a.op in COMPUTE for a in waited)
        for rank, row, source, sent in m.receives.T.tolist():
            assert step.times[rank, row, UNTIL] + error >= step.times[source, sent, BEGIN], "not before it was sent"


@pytest.mark.ranks(2)
def test_the_metrics_have_the_bubble_taken_apart(world: World, tmp_path: Path) -> None:
    folder = run(world, tmp_path, "--parallel.pp", "2")
    if world.rank:
        return
    records = read_metrics(folder / "metrics.jsonl")
    assert len(records) == 5
    for record in records:
        p = record["pipeline"]
        assert set(p) == {"ms", "bubble", "idle", "receive", "transfer", "other"}
        assert 0 < p["ms"] <= record["step_ms"] * 1.5
        parts = [p[name] for name in ("idle", "receive", "transfer", "other")]
        assert all(0 <= part <= 1 for part in parts)
        assert 0 < p["bubble"] < 1
        assert sum(parts) == pytest.approx(p["bubble"])
    assert [s.figures.as_dict() for s in load(folder).steps] == [r["pipeline"] for r in records[-3:]]
    assert cli.main(["timeline", str(folder)]) == 0
    assert (folder / "timeline.svg").exists()


@pytest.mark.ranks(2)
def test_it_can_be_switched_off(world: World, tmp_path: Path) -> None:
    folder = run(world, tmp_path, "--parallel.pp", "2", "--run.timeline", "0")
    if world.rank == 0:
        assert not (folder / "timeline.json").exists()
        assert [r["pipeline"] for r in read_metrics(folder / "metrics.jsonl")] == [None] * 5


@pytest.mark.ranks(4)
def test_pipelines_side_by_side_and_tensor_parallel(world: World, tmp_path: Path) -> None:
    folder = run(world, tmp_path, "--parallel.pp", "2", "--parallel.tp", "2", "--train.steps", "3")
    if world.rank == 0:
        trace = load(folder)
        assert sorted(trace.measurement.seats) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        events = json.loads((folder / "timeline.json").read_text())["traceEvents"]
        assert {e["tid"] for e in events if e["ph"] == "X" and e["pid"] == 0} == {0, 1, 2, 3}


# ---------------------------------------------------------------- programs from files

BY_HAND = """\
# by_hand microbatches=4 stages=0/1
F:stage0@0,F:stage0@1,F:stage0@2,BW:stage0@0,F:stage0@3,BW:stage0@1,BW:stage0@2,BW:stage0@3
F:stage1@0,F:stage1@1,BW:stage1@0,F:stage1@2,BW:stage1@1,BW:stage1@2,F:stage1@3,BW:stage1@3
"""


@pytest.mark.ranks(2)
def test_programs_from_files_train_as_1f1b_does(world: World, tmp_path: Path) -> None:
    """One with computes only, and the complete one that it became; the same bits."""
    hand, whole = tmp_path / "hand.csv", tmp_path / "whole.csv"
    hand.write_text(BY_HAND)
    pipeline = ("--parallel.pp", "2")

    def losses(*words: str) -> list[float]:
        folder = run(world, tmp_path, *pipeline, *words)
        return [r["loss"] for r in read_metrics(folder / "metrics.jsonl")] if world.rank == 0 else []

    expected = losses()
    assert losses("--schedule.microbatches=none", "--schedule.file", str(hand)) == expected
    became = ""
    if world.rank == 0:
        m = load(tmp_path / "run").measurement
        assert m.order.to_csv() == BY_HAND
        saved = load_config([], tmp_path / "run" / "config.toml").config.schedule
        assert (saved.kind, saved.file, saved.microbatches) == (None, str(hand), 4)
        became = m.program.to_csv()
    whole.write_text(broadcast_object(world.group, became))
    assert "SEND" in whole.read_text() and "REDUCE" in whole.read_text()
    assert losses("--schedule.file", str(whole)) == expected


def refused(tmp_path: Path, *words: str) -> str:
    """``triloom train`` on two ranks must refuse; what it says."""
    command = [sys.executable, "-m", "triloom", "train", "--config", str(tiny(tmp_path)), "--parallel.pp", "2", *words]
    done = launch(2, command, cwd=tmp_path)
    assert done.returncode == cli.REFUSED, done.stderr
    assert not (tmp_path / "run").exists()
    return done.stderr


def test_a_program_that_blocks_is_refused_once_with_file_and_grid(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(BY_HAND.replace("F:stage1@2,BW:stage1@1,", "BW:stage1@2,BW:stage1@1,F:stage1@2,", 1))
    said = refused(tmp_path, "--schedule.file", str(path))
    assert said.count(f"schedule.file = {str(path)!r}: ") == 1
    assert ">>" in said


def test_a_complete_program_is_refused_with_the_model_in_hand(tmp_path: Path) -> None:
    path = tmp_path / "whole.csv"
    path.write_text(
        "# whole microbatches=1 stages=0/1\n"
        "F:stage0@0,SEND:act0@0>1,RECV:grad1@0<1,BW:stage0@0,REDUCE:grads.7,CLIP:all\n"
        "WEIGH:all,RECV:act0@0<0,F:stage1@0,BW:stage1@0,SEND:grad1@0>0,REDUCE:grads.0,CLIP:all\n"
    )
    said = refused(tmp_path, "--schedule.file", str(path), "--schedule.microbatches", "none")
    assert said.count(f"schedule.file = {str(path)!r}: ") == 1
    assert "REDUCE:grads.7" in said
