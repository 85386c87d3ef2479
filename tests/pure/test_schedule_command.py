"""``triloom schedule``: grid, table, JSON, pictures, files; what is wrong is named with a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from triloom import cli
from triloom.actions import parse_program
from triloom.errors import ConfigError
from triloom.measured import Measurement, Seat
from triloom.passes import add_communication
from triloom.program_file import has_transfers, load_program, with_transfers
from triloom.schedules import NAMED, one_f_one_b
from triloom.trace import Step, Trace, save


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["schedule", *words]) == cli.OK
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["schedule", *words]) == cli.REFUSED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("triloom: ")
    return said.err


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_schedule_is_shown_with_its_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, name, "--stages", "8", "--micro", "32")
    lines = text.splitlines()
    assert lines[0].startswith(f"{name}: 8 ranks, ")
    assert sum(line.startswith("rank 7 ") for line in lines) >= 1
    table = lines.index(next(line for line in lines if line.startswith("schedule  ")))
    assert lines[table + 1].startswith(f"{name} ")
    assert max(map(len, lines[:table])) <= 120


def test_the_table_says_what_the_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("1f1b", "--stages", "8", "--micro", "24", "--costs=18.522,18.086,9.337,0.601", "--compare", "gpipe")
    report = json.loads(shown(capsys, *words, "--memory", "10", "--json"))
    assert report["costs"] == {"F": 18.522, "B": 18.086, "W": 9.337, "comm": 0.601}
    ours, gpipe = report["schedules"]
    assert (ours["name"], ours["ranks"], ours["microbatches"], ours["fits"]) == ("1f1b", 8, 24, True)
    assert round(ours["bubble_span"], 4) == 0.2431, "Zero Bubble paper, table 5"
    assert {"bubble", "bubble_span", "bubble_ideal", "makespan"} <= set(ours)
    assert ours["peak"] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert (gpipe["name"], gpipe["peak"], gpipe["fits"]) == ("gpipe", [24.0] * 8, False)
    lines = shown(capsys, *words, "--memory", "10").splitlines()
    for figures in (ours, gpipe):
        row = next(line for line in lines if line.startswith(f"{figures['name']}  ")).split()
        assert row[1] == f"{figures['makespan']:.6g}"
        assert row[2:5] == [f"{figures[form]:.4f}" for form in ("bubble", "bubble_span", "bubble_ideal")]
        assert row[-1] == ("yes" if figures["fits"] else "no")


def test_auto_is_searched_within_the_memory_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("auto", "--stages", "4", "--micro", "6", "--memory", "4", "--compare", "1f1b,zb_h1")
    ours, *named = json.loads(shown(capsys, *words, "--json"))["schedules"]
    assert ours["fits"] and max(ours["peak"]) <= 4
    assert ours["bound"] <= ours["makespan"] <= min(n["makespan"] for n in named)
    assert ours["gap"] == pytest.approx(ours["makespan"] / ours["bound"] - 1)
    text = shown(capsys, *words)
    assert text.startswith("auto") and "orders tried; no program is shorter than" in text
    assert "fits a memory of 0.01" in refused(capsys, "auto", "--memory", "0.01")


def test_costs_measured_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = Measurement(add_communication(one_f_one_b(2, 4)), ((0,), (1,)), (Seat(0, 0), Seat(1, 0)))
    times = np.zeros((2, m.most, 4), dtype=np.int64)
    for rank, row in enumerate(m.program.ranks):
        lengths = [{"F": 2, "BW": 5 + rank}.get(a.op, 0) * 1_000_000 for a in row]
        times[rank, : len(row), 1] = np.cumsum(lengths)
        times[rank, : len(row), 0] = np.cumsum(lengths) - lengths
    save(Trace(m, (Step(0, times, m.figures(times)),), "pp=2", (0.0, 0.0)), tmp_path)
    report = json.loads(shown(capsys, "gpipe", "--measured", str(tmp_path), "--json"))
    assert report["costs"] == {"F": [2.0, 2.0], "BW": [5.0, 6.0], "comm": 0.0}
    (figures,) = report["schedules"]
    assert (figures["ranks"], figures["microbatches"], figures["makespan"]) == (2, 4, 2 + 4 * 2 + 4 * 6 + 5)
    assert "zb_h1 splits B from W, and the run measured BW" in refused(capsys, "zb_h1", "--measured", str(tmp_path))
    said = refused(capsys, "1f1b", "--measured", str(tmp_path), "--costs", "1,1,1")
    assert "--costs and --measured both say what actions take" in said
    saved = tmp_path / "auto.csv"
    shown(capsys, "auto", "--measured", str(tmp_path), "--save", str(saved))
    assert {a.op for row in load_program(saved).ranks for a in row} == {"F", "BW"}, "what was not measured is not split"


def test_a_picture_has_a_panel_for_each_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "both.svg"
    shown(capsys, "1f1b", "--compare", "gpipe", "--out", str(out))
    text = out.read_text()
    assert ">1f1b</text>" in text and ">gpipe</text>" in text


def test_no_ranks_and_no_torch_are_needed() -> None:
    code = (
        "import sys; from triloom import cli; code = cli.main(['schedule', '1f1b', '--json']); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schedules"][0]["name"] == "1f1b"


def test_help_names_every_option_and_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--help")
    for word in ("--stages", "--micro", "--costs", "--memory", "--compare", "--json", "--out", "--file", *NAMED):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["1f1"], "'1f1' is not a schedule; did you mean '1f1b'?"),
        (["nothing-like-it"], "is not a schedule; schedules are gpipe, 1f1b"),
        (["1f1b", "--compare", "gpip"], "'gpip' is not a schedule; did you mean 'gpipe'?"),
        ([], "shows one schedule, NAME or --file FILE, and got nothing"),
        (["1f1b", "gpipe"], "got 1f1b gpipe; see --compare"),
        (["1f1b", "--stage", "3"], "--stage is not an option; did you mean 'stages'?"),
        (["1f1b", "--stages", "0"], "--stages '0': must be at least 1"),
        (["1f1b", "--micro", "many"], "--micro 'many': must be of type int"),
        (["1f1b", "--costs", "1,2"], "--costs 1,2: three or four numbers are needed"),
        (["1f1b", "--costs", "0,1,1"], "must be numbers of at least 0, that of the forward above 0"),
        (["1f1b", "--memory", "0"], "--memory '0': must be above 0"),
        (["1f1b", "--out", "a.pdf"], "a picture is written as .svg or .png"),
        (["1f1b", "--out", "/no/such/a.svg"], "the folder '/no/such' does not exist"),
        (["--file", "/no/such.csv"], "the program '/no/such.csv' cannot be read: No such file or directory"),
    ],
)
def test_refusals(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *words)


# ---------------------------------------------------------------- files

BY_HAND = """\
# mine microbatches=2 stages=0/1
F:stage0@0,F:stage0@1,BW:stage0@0,BW:stage0@1
F:stage1@0,BW:stage1@0, F:stage1@1,BW:stage1@1
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.csv"
    path.write_text(text)
    return str(path)


def test_a_program_written_by_hand_is_shown_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(shown(capsys, "--file", write(tmp_path, BY_HAND), "--compare", "1f1b", "--json"))
    mine, ours = report["schedules"]
    assert (mine["name"], ours["name"]) == ("mine", "1f1b")
    assert mine["makespan"] == ours["makespan"], "it is 1F1B"


def test_a_saved_program_loads_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "saved.csv"
    shown(capsys, "1f1b", "--stages", "3", "--micro", "5", "--save", str(path))
    program = load_program(path)
    assert program == one_f_one_b(3, 5) == parse_program(path.read_text())
    whole = with_transfers(program)
    assert has_transfers(whole) and with_transfers(whole) is whole
    path.write_text(whole.to_csv())
    assert "1f1b" in shown(capsys, "--file", str(path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "mine.csv:1: a program file starts with '# NAME microbatches=M stages=0/1/...'"),
        (BY_HAND.replace("# mine", "mine"), "mine.csv:1: a program file starts with"),
        (BY_HAND.replace("BW:stage0@1", "X:stage0@1"), "mine.csv:2 (rank 0, action 4): 'X:stage0@1' is not an action"),
        (BY_HAND.replace(" F:stage1@1", "F:stage1@01"), "mine.csv:3 (rank 1, action 3): 'F:stage1@01' is not in canon"),
        (
            BY_HAND.replace("BW:stage1@1", "BW:stage2@1"),
            "mine.csv:3 (rank 1, action 4): BW:stage2@1 is of a stage that",
        ),
        (BY_HAND.replace("stages=0/1", "stages=0/1/2"), "coordinates 0 to 2, but 2 rows of actions follow"),
        (BY_HAND.replace("microbatches=2", "microbatches=0"), "microbatches=0; a program needs at least one"),
    ],
)
def test_a_file_that_is_no_program_is_refused_with_its_line(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "--file", write(tmp_path, text))


def test_a_program_that_cannot_run_is_refused_with_the_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = BY_HAND.replace("F:stage1@0,BW:stage1@0", "BW:stage1@0,F:stage1@0")
    said = refused(capsys, "--file", write(tmp_path, swapped))
    assert "mine.csv: " in said and "BW:stage1@0" in said
    assert ">>" in said, "the grid marks the actions"
    said = refused(capsys, "--file", write(tmp_path, BY_HAND.replace(",BW:stage0@1", "")))
    assert said.startswith(f"triloom: {tmp_path / 'mine.csv'}: ") and ">> 1 F:stage0@1" in said


def test_a_program_with_state_actions_is_for_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, BY_HAND.replace("BW:stage0@1", "BW:unit0@1,REDUCE:grads.0"))
    assert "has actions on the training state" in refused(capsys, "--file", path)


def test_sizes_come_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, BY_HAND)
    assert f"--stages 4: the program in {path} has 2" in refused(capsys, "--file", path, "--stages", "4")
    assert "--micro 4" in refused(capsys, "--file", path, "--micro", "4")
    shown(capsys, "--file", path, "--stages", "2", "--micro", "2")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: it is not text"):
        load_program(tmp_path / "x.csv")
