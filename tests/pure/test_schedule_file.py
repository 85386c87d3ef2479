"""``schedule.file`` of a run: planned, refused with file and keys, shown by a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from triloom import cli
from triloom.config import load
from triloom.config.show import to_toml
from triloom.errors import ConfigError
from triloom.plan import Plan, make_plan
from triloom.program_file import complete, has_state, load_program
from triloom.schedules import one_f_one_b

BY_HAND = """\
# mine microbatches=2 stages=0/1
F:stage0@0,F:stage0@1,BW:stage0@0,BW:stage0@1
F:stage1@0,BW:stage1@0,F:stage1@1,BW:stage1@1
"""
COMPLETE = """\
# whole microbatches=1 stages=0/1
F:stage0@0,SEND:act0@0>1,RECV:grad1@0<1,BW:stage0@0,REDUCE:grads.0,CLIP:all,STEP:params.0
WEIGH:all,RECV:act0@0<0,F:stage1@0,BW:stage1@0,SEND:grad1@0>0,REDUCE:grads.0,CLIP:all,STEP:params.0
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mine.csv"
    file.write_text(BY_HAND)
    return file


def planned(*words: str, world: int = 2) -> Plan:
    loaded = load(words)
    return make_plan(loaded.config, world, data_vocab=256, sources=loaded.sources)


def test_the_program_is_what_runs_and_says_how_many_microbatches(path: Path) -> None:
    plan = planned("--parallel.pp", "2", "--schedule.file", str(path))
    assert plan.order == load_program(path)
    assert plan.microbatches == 2
    assert plan.config.schedule.kind is None
    again = path.with_name("again.toml")
    again.write_text(to_toml(plan.config))
    assert make_plan(load([], again).config, 2, data_vocab=256).order == plan.order


def test_without_a_file_it_is_1f1b_unless_named() -> None:
    plan = planned("--parallel.pp", "2", "--schedule.microbatches", "4")
    assert (plan.config.schedule.kind, plan.order) == ("1f1b", one_f_one_b(2, 4))
    assert planned("--parallel.pp", "2", "--schedule.kind", "gpipe").order.name == "gpipe"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--schedule.kind", "1f1b"],
            "schedule.kind = 1f1b (command line), schedule.file = FILE (command line): the file",
        ),
        (["--parallel.pp", "1"], "the program is for pp = 2, the run has 1"),
        (["--parallel.pp", "2", "--schedule.microbatches", "3"], "the program is for microbatches = 2, the run has 3"),
        (["--parallel.pp", "2", "--train.batch", "1"], "a dp rank has 1 samples a step and cannot split them further"),
    ],
)
def test_what_does_not_fit_the_run_is_refused_with_its_keys(path: Path, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned("--schedule.file", str(path), *words)
    assert says.replace("FILE", str(path)) in str(caught.value)


def test_a_schedule_with_several_stages_a_rank_needs_as_many_units() -> None:
    words = ("--parallel.pp", "2", "--schedule.kind", "zb_v", "--model.layers")
    with pytest.raises(
        ConfigError, match="4 pipeline stages need at least 4 units; 1 layers, embedding and head are 3"
    ):
        planned(*words, "1")
    assert len(planned(*words, "2").order.stages) == 4


def test_a_dry_run_shows_and_proves_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--dry-run", "2", "--parallel.pp", "2", "--schedule.file", str(path)]
    assert cli.main(words) == cli.OK
    shown = capsys.readouterr().out
    assert f'file = "{path}"' in shown and "# mine, by pipeline coordinate" in shown
    assert "SEND:act0@0>1" in shown and "# proven: " in shown
    path.write_text(COMPLETE)
    assert cli.main(words) == cli.OK
    shown = capsys.readouterr().out
    assert "REDUCE:grads.0" in shown and "# proven: " not in shown, "its units are not there yet"
    path.write_text(BY_HAND.replace("F:stage1@0,BW:stage1@0", "BW:stage1@0,F:stage1@0"))
    assert cli.main(words) == cli.REFUSED
    said = capsys.readouterr().err
    assert f"schedule.file = {str(path)!r}: " in said and ">>" in said and "problems" not in said
    path.unlink()
    assert cli.main(words) == cli.REFUSED
    assert "cannot be read: No such file" in capsys.readouterr().err


def test_a_complete_program_stays_as_it_is(path: Path) -> None:
    path.write_text(COMPLETE)
    program = load_program(path)
    assert has_state(program)
    assert complete(program, layout=None, placement=None) is program  # type: ignore[arg-type]  # neither is looked at
