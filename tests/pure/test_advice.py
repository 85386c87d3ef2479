"""The last line of a run that failed."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

import pytest

from triloom.advice import GO_ON, OTHERWISE, advice
from triloom.cli import main
from triloom.engine import Engine
from triloom.errors import DeadlineError, GroupError, MismatchError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (DeadlineError("rank 3"), "longer train.deadline"),
        (MismatchError("x"), "same program and configuration"),
        (GroupError("x"), "and at the network"),
        (MemoryError(), "raise schedule.microbatches"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "--dry-run"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "--dry-run"),
        (OSError(errno.ENOSPC, "No space left"), "make room"),
        (FileNotFoundError(errno.ENOENT, "gone", "x"), "the file or host named above"),
        (ZeroDivisionError(), OTHERWISE),
    ],
)
def test_every_kind_of_error_says_what_to_do(error: Exception, said: str) -> None:
    line = advice(error)
    assert line.startswith("what to do: ") and said in line and line.endswith(GO_ON) and "\n" not in line


def test_a_training_that_breaks_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine, *batch: object) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Engine, "step", fail)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    words = f"--model.layers 1 --model.hidden 8 --model.heads 2 --model.seq 8 --data.path {tmp_path / 'text.txt'}"
    with pytest.raises(RuntimeError) as raised:
        main(["train", *words.split(), "--run.dir", str(tmp_path / "run")])
    last = "".join(traceback.format_exception(raised.value)).splitlines()[-1]
    assert last == advice(raised.value) and "--dry-run" in last
