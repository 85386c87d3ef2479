"""Runs under mpirun that end before they are done: killed, or told to stop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import checkpoint_cases as cases
from harness import launch
from harness.launcher import mpirun
from triloom.checkpoint import found, path_of, verify

CASES = str(Path(__file__).with_name("cases_resume.py"))
NAMES = ("one", "dp2", "tp2", "pp2", "dp2_pp2")

TINY = """
[model]
layers = 1
hidden = 16
heads = 2
seq = 16
dropout = 0.1
[train]
batch = 4
steps = {steps}
threads = 1
eval_batches = 0
deadline = 30
[optim]
steps = 40
warmup = 4
[run]
plot = false
timeline = 0
[data]
path = {path!r}
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both tasks of cases_resume, each in processes of its own."""
    folder = tmp_path_factory.mktemp("killed")
    before = launch(4, [sys.executable, CASES, "before", str(folder)], timeout=200)
    assert before.returncode != 0 and not (folder / "broken.json").exists(), "it was killed"
    after = launch(4, [sys.executable, CASES, "after", str(folder)], timeout=150)
    assert after.returncode == 0, after.stderr
    assert not before.leftovers and not after.leftovers
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_are_ten_a_kill_and_ten_more(killed: Path, name: str) -> None:
    """Losses and gradient norms to the last bit, and all of the state."""
    told = [json.loads((killed / f"{task}.json").read_text())[name] for task in ("whole", "resumed")]
    assert told[0] == told[1] and len(told[0]) == 20
    ends = [cases.canonical(killed / f"{name}-{task}", own=True) for task in ("whole", "resumed")]
    assert ends[0] == ends[1]
    assert found(killed / name)[-1] == 10 and verify(path_of(killed / name, 10))


def start(folder: Path, steps: int, *words: str) -> subprocess.Popen[str]:
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (folder / "tiny.toml").write_text(TINY.format(steps=steps, path=str(text)))
    command = [mpirun(), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]
    command += ["-n", "2", sys.executable, "-m", "triloom", "train", "--config", str(folder / "tiny.toml"), *words]
    env = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def end(process: subprocess.Popen[str], after: Path, number: int) -> tuple[int, str, str]:
    """Send a signal to mpirun once the file ``after`` has some lines."""
    try:
        until = time.monotonic() + 60
        while not (after.exists() and after.read_text().count("\n") > 3) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, out, err


def test_sigusr1_through_mpirun_saves_on_all_ranks_and_leaves_with_75(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    code, out, err = end(start(tmp_path, 100_000, "--run.dir", str(folder)), metrics, signal.SIGUSR1)
    assert code == 75, err
    assert "SIGUSR1: saving after this step, then leaving" in err and "Traceback" not in err
    (step,) = found(folder / "checkpoints")
    assert verify(path_of(folder / "checkpoints", step)).extra["records"] == step
    lines = metrics.read_text().splitlines()
    assert len(lines) == step and f"triloom train --resume {folder} goes on" in out
    more = start(tmp_path, step + 2, "--resume", str(folder), f"--train.steps={step + 2}")
    out, err = more.communicate(timeout=60)
    assert more.returncode == 0, err
    assert f"goes on after step {step}" in out
    assert metrics.read_text().splitlines()[:step] == lines
    assert len(metrics.read_text().splitlines()) == step + 2


@pytest.mark.full
def test_sigterm_to_mpirun_saves_if_the_state_is_small(tmp_path: Path) -> None:
    """Open MPI gives the ranks a moment, and returns a code of its own."""
    folder = tmp_path / "run"
    code, _, _ = end(start(tmp_path, 100_000, "--run.dir", str(folder)), folder / "metrics.jsonl", signal.SIGTERM)
    assert code not in (0, 75)
    for step in found(folder / "checkpoints"):
        verify(path_of(folder / "checkpoints", step))
