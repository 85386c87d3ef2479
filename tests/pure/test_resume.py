"""Runs that end and go on, on ranks that are threads: the numbers, the files, the samples, the wish to stop."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_cases as cases
from triloom import boot
from triloom.checkpoint import found, path_of
from triloom.cli import main, read_options
from triloom.config import load
from triloom.data import Windows
from triloom.errors import CheckpointError, ConfigError, TriloomError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.runlog import Result, read_metrics
from triloom.sinks import Sink
from triloom.stopping import STOP, Stop
from triloom.train import train

TINY = """
[model]
shape = "gpt2"
layers = 2
hidden = 16
heads = 2
seq = 16
dropout = 0.1
[train]
batch = 4
steps = 8
threads = 1
eval_batches = 1
[optim]
lr = 1e-2
steps = 8
warmup = 1
[checkpoint]
every = 4
[run]
plot = false
timeline = 0
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 12)
    path = tmp_path / "tiny.toml"
    path.write_text(TINY + f"[data]\npath = '{text}'\nheld_out = 0.1\n")
    return path


def run(config: Path, ranks: int, words: Sequence[str], sinks: Sequence[Sink] = ()) -> tuple[list[Result], str]:
    """The job on ranks that are threads, and what rank 0 printed."""
    out = io.StringIO()

    def body(group: Group) -> Result:
        world = boot.init(group=group, hooks=False, threads=1, device="cpu", local_rank=0, local_size=1)
        loaded = load(words, config)
        return train(loaded.config, world, sources=loaded.sources, out=out, sinks=sinks)

    before = torch.get_num_threads()
    try:
        return run_threads(ranks, body), out.getvalue()
    finally:
        torch.set_num_threads(before)


def told(folder: Path) -> list[tuple[Any, ...]]:
    """What metrics.jsonl says of each step that depends on the training alone."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "held_out_loss")
    return [tuple(r[k] for k in keys) for r in read_metrics(folder / "metrics.jsonl")]


class Crash(TriloomError):
    """Stands for a process that is killed."""


def crash_at(step: int) -> Sink:
    def sink(record: Any) -> None:
        if record["step"] == step:
            raise Crash("killed")

    return sink


def test_a_run_that_crashed_goes_on_as_if_it_had_not(config: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["--parallel.dp", "2", "--checkpoint.keep", "none"]
    run(config, 2, [*words, "--run.dir", str(whole)])
    with pytest.raises(Crash):
        run(config, 2, [*words, "--run.dir", str(broken), "--checkpoint.asynchronous", "false"], [crash_at(6)])
    assert found(broken / "checkpoints") == [4]
    assert len(told(broken)) == 7, "steps 4 to 6 are in the file and were not saved"
    results, said = run(config, 2, [*words, "--run.resume", str(broken)])
    assert results[0].folder == broken and "goes on after step 4" in said
    assert told(broken) == told(whole)
    assert found(broken / "checkpoints") == found(whole / "checkpoints") == [4, 8]
    ends = [cases.canonical(path_of(folder / "checkpoints", 8)) for folder in (broken, whole)]
    assert ends[0] == ends[1]


def test_samples_are_those_of_the_uninterrupted_run_whatever_dp(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the edge of an epoch: 28 windows, 4 a step; saved on 4 dp ranks, then on 2, then on 1."""
    used: list[int] = []
    lock = threading.Lock()
    read = Windows.read

    def note(self: Windows, where: Any) -> Any:
        if self.shuffle:  # not those of an evaluation
            with lock:
                used.extend(where.start.tolist())
        return read(self, where)

    monkeypatch.setattr(Windows, "read", note)
    base = ["--data.prefetch", "0", "--checkpoint.every", "3", "--optim.steps", "9"]
    run(config, 1, [*base, "--train.steps", "9", "--run.dir", str(tmp_path / "whole")])
    want, used[:] = sorted(used), []
    folder = str(tmp_path / "parts")
    for dp, steps in ((4, 3), (2, 6), (1, 9)):
        again = [] if dp == 4 else ["--run.resume", "auto"]
        run(config, dp, [*base, *again, "--train.steps", str(steps), "--run.dir", folder])
    assert sorted(used) == want
    assert len(want) == 36 and len({start % 16 for start in want}) == 2, "each epoch begins at an offset of its own"
    losses = [[r[1] for r in told(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_run_is_resumed_from_a_checkpoint_into_a_new_folder(config: Path, tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(config, 1, ["--run.dir", str(first), "--checkpoint.keep", "2"])
    before = told(first)
    middle = path_of(first / "checkpoints", 4)
    _, said = run(config, 1, ["--run.resume", str(middle), "--run.dir", str(tmp_path / "fork")])
    assert "trained 4 steps" in said
    assert told(tmp_path / "fork") == before[4:]
    assert told(first) == before, "the run it came from is left alone"


def test_steps_made_anew_are_not_mistaken_for_those_given_up(config: Path, tmp_path: Path) -> None:
    """Back to step 2 in the same folder: the checkpoints of steps 4 and 8 are not this run's any more."""
    folder = tmp_path / "run"
    run(config, 1, ["--run.dir", str(folder), "--checkpoint.every", "2", "--checkpoint.keep", "none"])
    again = ["--run.resume", str(path_of(folder / "checkpoints", 2)), "--run.dir", str(folder)]
    run(config, 1, [*again, "--checkpoint.every", "3", "--train.steps", "3", "--optim.lr", "0.02"])
    assert found(folder / "checkpoints") == [2, 3] and len(told(folder)) == 3
    assert sorted(p.name for p in (folder / "checkpoints").glob("*.abandoned"))[0] == "step-00000004.abandoned"


def test_a_finished_run_has_nothing_left_to_do(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config, 1, ["--run.dir", str(folder)])
    before = told(folder)
    results, said = run(config, 1, ["--run.resume", "auto", "--run.dir", str(folder)])
    assert "trained 0 steps" in said and results[0].stopped is None
    assert told(folder) == before


def test_auto_begins_where_there_is_no_checkpoint_yet(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Crash):
        run(config, 1, ["--run.dir", str(folder)], [crash_at(2)])
    run(config, 1, ["--run.dir", str(folder), "--run.resume", "auto"])
    assert [r[0] for r in told(folder)] == list(range(8))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--run.resume", "auto"], "goes on in run.dir, which is not given"),
        (["--run.resume", "auto", "--run.dir", "{tmp}/other"], "is not empty and not a run"),
        (["--run.resume", "{tmp}/nothing"], "is not a folder"),
        (["--run.resume", "{tmp}/empty"], "holds no checkpoint; {tmp}/empty/checkpoints should"),
        (
            ["--run.resume", "{tmp}/run", "--run.dir", "{tmp}/other"],
            "is not empty, and {tmp}/run/checkpoints is not in it",
        ),
    ],
)
def test_nothing_to_go_on_from_is_an_error_before_anything_is_built(
    config: Path, tmp_path: Path, words: list[str], reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other" / "something").mkdir(parents=True)
    path_of(tmp_path / "run" / "checkpoints", 4).mkdir(parents=True)
    with pytest.raises(TriloomError) as caught:
        run(config, 2, [w.replace("{tmp}", str(tmp_path)) for w in words])
    assert reason.replace("{tmp}", str(tmp_path)) in str(caught.value)


def test_a_checkpoint_of_another_model_says_what_differs(config: Path, tmp_path: Path) -> None:
    run(config, 1, ["--run.dir", str(tmp_path / "run"), "--train.steps", "4"])
    words = ["--run.resume", str(tmp_path / "run"), "--parallel.dp", "2"]
    for change, text in (
        (["--model.hidden", "32"], "is F32 \\[256, 16\\] there and F32 \\[256, 32\\] here"),
        (["--model.layers", "3"], "it holds no params/blocks.2"),
        (["--model.layers", "1"], "it also holds exp_avg/"),
        (["--optim.kind", "lion"], "it also holds exp_avg_sq/"),
        (["--optim.kind", "sgd"], "it holds no momentum/"),
    ):
        with pytest.raises(CheckpointError, match=text):
            run(config, 2, [*words, *change])


# ---------------------------------------------------------------- told to stop


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank alone is told; all leave after the same step."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    words = ["--parallel.dp", "2", "--checkpoint.every", "0"]
    run(config, 2, [*words, "--run.dir", str(whole)])
    stops: list[Stop] = []

    class Watched(Stop):
        def __init__(self, *, speak: bool = False) -> None:
            super().__init__(speak=speak)
            stops.append(self)

    def tell(record: Any) -> None:
        if record["step"] == 4:
            stops[-1].signal = "SIGTERM"

    monkeypatch.setattr("triloom.resuming.Stop", Watched)
    results, said = run(config, 2, [*words, "--run.dir", str(folder)], [tell])
    assert all(r.stopped in ("SIGTERM", "a signal to another rank") for r in results)
    assert "after 6 steps" in said and f"triloom train --resume {folder} goes on" in said
    assert found(folder / "checkpoints") == [6]
    run(config, 2, [*words, "--run.resume", str(folder)])
    assert told(folder) == told(whole)


def test_the_first_signal_is_a_wish() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    with Stop() as stop:
        assert stop.notice() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        for _ in range(100):
            if stop.signal:
                break
            threading.Event().wait(0.05)
        assert (stop.signal, stop.notice()) == ("SIGUSR1", STOP)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_signal_leaves_at_once_even_in_native_code() -> None:
    """The main thread waits in C, where no Python handler runs."""
    code = (
        "import ctypes, sys\n"
        "from triloom.stopping import Stop\n"
        "with Stop(speak=True):\n"
        "    print('ready', flush=True)\n"
        "    libc, end = ctypes.CDLL(None), __import__('time').monotonic() + 20\n"
        "    while __import__('time').monotonic() < end: libc.poll(None, 0, 20000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving after this step" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    process.stdout.close()
    process.stderr.close()


# ---------------------------------------------------------------- the commands


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "triloom", *words], capture_output=True, text=True, timeout=60)


def test_the_command_looks_at_checkpoints(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    run(config, 2, ["--run.dir", str(folder), "--parallel.dp", "2"])
    newest = path_of(folder / "checkpoints", 8)
    for place in (folder, folder / "checkpoints", newest):
        assert main(["checkpoint", "inspect", str(place)]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"{newest}\nafter 8 updates on dp=2 x pp=1 x tp=1") and "next sample 32" in said
    assert main(["checkpoint", "inspect", str(folder), "--json", "--tensors"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["others"] == ["step-00000004"] and about["step"] == 8
    assert about["states"]["exp_avg"]["dtypes"] == ["F32"]
    assert about["tensors"]["params/embed.tokens.weight"]["shape"] == [256, 16]
    assert about["extra"]["config"]["train"]["steps"] == 8
    assert main(["checkpoint", "verify", str(folder)]) == 0
    assert capsys.readouterr().out.count(": whole, ") == 2
    file = path_of(folder / "checkpoints", 4) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["checkpoint", "verify", str(folder)]) == 1
    assert "step-00000004: DAMAGED: " in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(folder), "--newest"]) == 0
    for words, text in (
        (["look", str(folder)], "knows inspect, verify"),
        (["verify", str(tmp_path)], "is no checkpoint and holds none"),
        (["verify"], "takes one folder, got nothing"),
    ):
        assert main(["checkpoint", *words]) == 2
        assert text in capsys.readouterr().err


def test_resume_takes_the_configuration_of_the_run(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config, 1, ["--run.dir", str(folder), "--train.steps", "4"])
    for place in (folder, folder / "checkpoints", path_of(folder / "checkpoints", 4)):
        options = read_options(["--resume", str(place), "--train.steps", "8"])
        assert options.config == str(folder / "config.toml")
        assert options.words == ("--train.steps", "8", f"--run.resume={place}")
    assert read_options(["--resume", str(folder), "--config", "mine.toml"]).config == "mine.toml"
    assert read_options(["--resume", "--run.dir=x"]).words == ("--run.dir=x", "--run.resume=auto")
    with pytest.raises(ConfigError, match="--resume is given twice"):
        read_options(["--resume", "a", "--resume=b"])
    done = command("train", "--resume", str(folder), "--train.steps", "8")
    assert done.returncode == 0, done.stderr
    assert "goes on after step 4" in done.stdout and len(told(folder)) == 8
    nothing = command("train", "--resume", str(tmp_path))
    assert nothing.returncode == 2 and "holds no checkpoint" in nothing.stderr
