"""Run directories, metrics files, the live line, the plot, and setting up together."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
from pathlib import Path

import pytest

from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.liveline import LiveLine, Pace, duration, on_terminal
from triloom.plot import PlotUnavailableError, plot_losses
from triloom.runlog import FILES, MetricsFile, make_run_dir, read_metrics
from triloom.together import SetupError, agree_on, together

# ---------------------------------------------------------------- run directory


def test_runs_started_in_the_same_second_do_not_clash(tmp_path: Path) -> None:
    made = [make_run_dir(None, False, tmp_path / "runs") for _ in range(4)]
    assert len(set(made)) == 4 and all(path.is_dir() for path in made)


def test_a_used_folder_is_refused_and_overwriting_removes_only_a_runs_files(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert make_run_dir(str(folder), False) == folder
    assert make_run_dir(str(folder), False) == folder, "an empty folder will do"
    for name in (*FILES, "notes.txt"):
        (folder / name).write_text("old")
    with pytest.raises(ConfigError, match=r"is not empty; give another folder, or run.overwrite = true"):
        make_run_dir(str(folder), False)
    assert len(list(folder.iterdir())) == len(FILES) + 1
    make_run_dir(str(folder), True)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        make_run_dir(str(tmp_path / "file"), False)
    with pytest.raises(ConfigError, match="cannot be made: Not a directory"):
        make_run_dir(str(tmp_path / "file" / "below"), False)


def test_metrics_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write({"step": 0, "loss": 1.5, "peak_bytes": {"params": 3}})
        assert read_metrics(path) == [{"step": 0, "loss": 1.5, "peak_bytes": {"params": 3}}]
        metrics.write({"step": 1, "loss": float("nan")})
    assert json.loads(path.read_text().splitlines()[1], parse_constant=pytest.fail) == {"step": 1, "loss": None}
    with pytest.raises(FileExistsError):
        MetricsFile(path)


# ---------------------------------------------------------------- live line


def test_plain_lines_where_no_terminal_is() -> None:
    out = io.StringIO()
    line = LiveLine(out, steps=25, every=10)
    for done in range(1, 26):
        line.step(done, 2.0, 1234.5, 3.0)
    line.say("end")
    shown = out.getvalue().splitlines()
    assert [text.split("/")[0] for text in shown[:-1]] == ["step  1", "step 10", "step 20", "step 25"]
    assert shown[0] == "step  1/25  loss 2.0000  1,234 tokens/s  3s left"
    assert shown[-1] == "end" and "\r" not in out.getvalue()


def test_one_line_on_a_terminal_is_rewritten_and_left_whole() -> None:
    out = io.StringIO()
    line = LiveLine(out, steps=3, every=10, live=True)
    for done in range(1, 4):
        line.step(done, 2.0, 1.0, 0.0)
    line.say("end")
    text = out.getvalue()
    assert text.count("\n") == 2 and text.endswith("\nend\n")
    assert "step 1/3" in text and "step 3/3" in text
    assert text.startswith("\r") and max(map(len, text.replace("\n", "\r").split("\r"))) <= 80


def test_a_launchers_terminal_is_not_a_persons() -> None:
    """A rank's stdout may be a terminal while the launcher's goes to a file: the parent decides."""
    assert not on_terminal(io.StringIO())
    code = (
        "import subprocess, sys; print(subprocess.run([sys.executable, '-c', "
        "'import sys; from triloom.liveline import on_terminal; print(on_terminal(sys.stdout), file=sys.stderr)'], "
        "stdout=int(sys.argv[1]), stderr=subprocess.PIPE, text=True).stderr)"
    )
    import subprocess

    main, end = pty.openpty()
    try:
        common = {"timeout": 60, "check": True, "pass_fds": (end,), "text": True}
        hidden = subprocess.run([sys.executable, "-c", code, str(end)], stdout=subprocess.PIPE, **common)  # type: ignore[call-overload]
        assert hidden.stdout.strip() == "False", "own stdout is a terminal, the parent's is a pipe"
        subprocess.run([sys.executable, "-c", code, str(end)], stdout=end, **common)  # type: ignore[call-overload]
        assert os.read(main, 1000).decode().split() == ["True"]
    finally:
        os.close(main)
        os.close(end)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0s"), (7.4, "7s"), (59.6, "1:00"), (65, "1:05"), (7380, "2:03:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_time_left_does_not_count_the_first_step() -> None:
    pace = Pace(10)
    assert pace.left(1, 100.0) == 900.0
    assert pace.left(2, 1.0) == 8.0
    assert pace.left(3, 3.0) == 14.0
    assert pace.left(10, 1.0) == 0.0


# ---------------------------------------------------------------- plot


def test_plot_writes_both_formats(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="extra plot")
    curve = [(step, 5.0 - step) for step in range(4)]
    paths = plot_losses({"a": curve, "b": curve}, tmp_path, "title", spread=[(step, 0.0) for step in range(4)])
    assert [path.name for path in paths] == ["loss.svg", "loss.png"]
    assert paths[0].read_text().startswith("<?xml") and paths[1].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotUnavailableError, match=r"pip install 'triloom\[plot\]'"):
        plot_losses({"a": [(0, 1.0)]}, tmp_path, "title")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- together


def _messages(size: int, failing: dict[int, str]) -> list[str]:
    """What every rank is told when some fail at setting up."""

    def body(group: Group) -> str:
        def work() -> int:
            if group.rank in failing:
                raise ConfigError(failing[group.rank])
            return group.rank * 10

        try:
            assert together(group, work) == group.rank * 10
        except SetupError as error:
            return str(error)
        return "fine"

    return run_threads(size, body)


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ({}, "fine"),
        ({0: "bad", 1: "bad", 2: "bad"}, "bad"),
        ({1: "bad"}, "rank 1: bad"),
        ({1: "bad", 2: "bad"}, "ranks 1, 2: bad"),
        ({0: "one", 1: "two", 2: "one"}, "ranks 0, 2: one"),
    ],
)
def test_a_problem_anywhere_is_told_everywhere(failing: dict[int, str], told: str) -> None:
    assert _messages(3, failing) == [told] * 3


def test_ranks_that_disagree_are_named_with_what_they_have() -> None:
    def body(group: Group) -> str:
        agree_on(group, {"a": "1", "b": "2"}, "way out")
        try:
            agree_on(group, {"a": "1", "b": str(max(1, group.rank))}, "start alike")
        except SetupError as error:
            return str(error)
        return "fine"

    told = "the ranks disagree on b: ranks 0, 1: 1; rank 2: 2; start alike"
    assert run_threads(3, body) == [told] * 3
