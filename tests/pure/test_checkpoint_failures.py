"""What goes wrong with checkpoints: damaged and missing files, full and read-only disks, processes killed while they
save. The one before is loaded, or a clear error comes on every rank; never a mixture, never wrong values."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint_cases as cases
from triloom import _C
from triloom.checkpoint import Checkpoints, found, path_of, read_manifest, saving, verify
from triloom.checkpoint.disk import crc32c
from triloom.checkpoint.manifest import NAME
from triloom.engine import Engine
from triloom.errors import CheckpointError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads

CASE = cases.variants()["dp2"]
KILLER = Path(__file__).parents[1] / "checkpoint_killer.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved")

    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASE)
        with Checkpoints(engine, folder, keep=None) as checkpoints:
            for _ in range(2):
                cases.steps(engine, 1)
                checkpoints.save()

    run_threads(CASE.ranks, body)
    assert found(folder) == [1, 2]
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def resumed(folder: Path, ranks: int = 2) -> tuple[int, tuple[str, ...], dict[str, str]]:
    """The step that a resumed engine is at, what was said, and its state."""
    again = folder.parent / "again"

    def body(world: Group) -> tuple[int, tuple[str, ...]]:
        engine = cases.make_engine(world, CASE if ranks == 2 else cases.variants()["one"])
        restored = Checkpoints(engine, folder).resume()
        assert restored is not None and restored.step == engine.steps
        engine.save(again)
        return engine.steps, restored.notes

    step, notes = run_threads(ranks, body)[0]
    return step, notes, cases.canonical(again)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ---------------------------------------------------------------- damaged files


def test_the_newest_that_is_whole_is_loaded(folder: Path) -> None:
    assert resumed(folder)[:2] == (2, ())


def test_one_flipped_bit_anywhere_is_found(folder: Path, saved: Path) -> None:
    """In each file of the newest checkpoint, at random places; headers and the manifest included."""
    draw = random.Random(7)
    newest = path_of(folder, 2)
    for name in sorted(os.listdir(newest)):
        size = (newest / name).stat().st_size
        places = [draw.randrange(8 * size) for _ in range(12)] + [draw.randrange(8 * 64), 8 * size - 1]
        for bit in places:
            flip(newest / name, bit)
            with pytest.raises(CheckpointError, match=name if name != NAME else "manifest"):
                verify(newest)
            flip(newest / name, bit)
        flip(newest / name, draw.randrange(8 * size))
        step, notes, state = resumed(folder, ranks=1 if name == NAME else 2)
        assert step == 1 and notes[0].startswith("rejected step-00000002:")
        assert state == cases.canonical(path_of(saved, 1))
        shutil.rmtree(folder)
        shutil.copytree(saved, folder)


def _truncate(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(data[: len(data) // 2])


def _shorten(one: Path, other: Path) -> None:
    one.write_bytes(one.read_bytes()[:-1])


def _lengthen(one: Path, other: Path) -> None:
    one.write_bytes(one.read_bytes() + b"\0")


def _empty(one: Path, other: Path) -> None:
    one.write_bytes(b"")


def _unlink(one: Path, other: Path) -> None:
    one.unlink()


def _swap(one: Path, other: Path) -> None:
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def _pickle(one: Path, other: Path) -> None:
    one.write_bytes(pickle.dumps(Payload(one.parent.parent / "it ran")))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.marker),)


DAMAGE = {f.__name__[1:]: f for f in (_truncate, _shorten, _lengthen, _empty, _unlink, _swap, _pickle)}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_what_was_written_is_rejected(folder: Path, saved: Path, damage: str) -> None:
    newest = path_of(folder, 2)
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) == 2
    DAMAGE[damage](files[0], files[1])
    step, notes, state = resumed(folder)
    assert ((step, len(notes)) == (1, 1) and files[0].name in notes[0]) or files[1].name in notes[0]
    assert state == cases.canonical(path_of(saved, 1))
    assert found(folder) == [1] and newest.with_name(newest.name + ".rejected").is_dir()
    assert not (folder / "it ran").exists()


@pytest.mark.parametrize("damage", ["truncate", "empty", "unlink", "pickle", "other"])
def test_a_manifest_that_is_not_what_was_written_is_rejected(folder: Path, damage: str) -> None:
    manifest = path_of(folder, 2) / NAME
    if damage == "other":  # of the step before: sizes fit, and every tensor
        shutil.copy(path_of(folder, 1) / NAME, manifest)
    else:
        DAMAGE[damage](manifest, manifest)
    assert resumed(folder)[0] == 1
    assert not (folder / "it ran").exists()


def test_nothing_that_can_be_loaded_is_an_error_with_every_reason(folder: Path) -> None:
    for step in (1, 2):
        flip(path_of(folder, step) / "rank-00000.safetensors", 8 * 5000)
    before: list[torch.Tensor] = []

    def body(world: Group) -> None:
        engine = cases.make_engine(world, CASE)
        cases.steps(engine, 1)
        before.append(engine.state.buckets[0].master.clone())
        try:
            Checkpoints(engine, folder).resume()
        finally:
            assert engine.steps == 1
            assert any(torch.equal(engine.state.buckets[0].master, b) for b in before), "the engine was changed"

    with pytest.raises(
        CheckpointError, match=r"none of the checkpoints in .*(?s:.*)step-00000002: .*(?s:.*)step-00000001"
    ):
        run_threads(2, body)
    assert found(folder) == [1, 2], "what nothing could replace is left alone"


CRAFTED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a file elsewhere": (lambda m: m["files"].update({"../x.safetensors": m["files"].popitem()[1]}), "file name"),
    "a piece behind the file": (lambda m: first_piece(m).update(offset=1 << 40), "does not fit"),
    "a piece of another size": (lambda m: first_piece(m).update(stop=first_piece(m)["stop"] + 1), "does not fit"),
    "slices of no dimension": (lambda m: first_piece(m).update(dim=7, slices=[[0, 1]]), "does not fit"),
    "a tensor that is not complete": (lambda m: first_tensor(m)["pieces"].pop(), "are not all of it"),
    "an unknown dtype": (lambda m: first_tensor(m).update(dtype="object"), "object"),
    "no steps": (lambda m: m.pop("step"), "step"),
    "a later version": (lambda m: m.update(version=2), "has version 2, this program reads version 1"),
    "blocks of another size": (lambda m: m.update(block=17), "blocks of 17 bytes"),
}


def first_tensor(manifest: Any) -> Any:
    return next(iter(manifest["tensors"].values()))


def first_piece(manifest: Any) -> Any:
    return first_tensor(manifest)["pieces"][0]


@pytest.mark.parametrize("change", CRAFTED)
def test_a_manifest_that_makes_no_sense_is_rejected_though_its_checksum_is_right(folder: Path, change: str) -> None:
    path = path_of(folder, 2) / NAME
    content = json.loads(path.read_text())
    del content["crc32c"]
    alter, said = CRAFTED[change]
    alter(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**content, "crc32c": crc32c(canonical)}))
    with pytest.raises(CheckpointError, match=said):
        read_manifest(path.parent)


# ---------------------------------------------------------------- disks


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """``mount(options)``: a tmpfs with these options; skips where that is not allowed."""
    made: list[Path] = []

    def make(options: str) -> Path:
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs may be mounted: {done.stderr.strip()}")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", place], check=True)


def wide(world: Group, numel: int = 1 << 17) -> Engine:
    """A matrix of ``numel`` fp32 elements: three times four bytes each in a checkpoint."""
    from triloom.parallel.build import mean_loss

    return Engine([torch.nn.Linear(numel // 8, 8, bias=False)], mean_loss(torch.nn.functional.mse_loss), world=world)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(mount: Callable[[str], Path], asynchronous: bool) -> None:
    """1.5 MiB of state on a disk of 2 MiB: the first fits, the second does not."""
    disk = mount("size=2m")

    def body(world: Group) -> str:
        engine = wide(world)
        checkpoints = Checkpoints(engine, disk / "checkpoints", asynchronous=asynchronous)
        checkpoints.save()
        checkpoints.finish()
        engine.steps = 1
        with pytest.raises(CheckpointError) as caught:
            checkpoints.save()
            checkpoints.finish()
        return str(caught.value)

    said = run_threads(2, body)
    assert said[0] == said[1]
    assert f"a checkpoint in {disk}/checkpoints needs 15" in said[0] and "are free; free some space" in said[0]
    assert os.listdir(disk / "checkpoints") == ["step-00000000"]
    verify(path_of(disk / "checkpoints", 0))


def test_a_disk_that_fills_up_while_it_is_written(
    mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knew before: the error of the write itself says path, bytes needed and free."""
    disk = mount("size=2m")
    monkeypatch.setattr("triloom.checkpoint.saving.free_bytes", lambda path: "?")

    def body(world: Group) -> str:
        with pytest.raises(CheckpointError) as caught:
            wide(world, 1 << 18).save(disk / "one")
        return str(caught.value)

    said = run_threads(2, body)
    assert said[0] == said[1]
    assert "No space left on device" in said[0] and "rank-0000" in said[0]
    assert "needs 15" in said[0] and "are free" in said[0]
    assert os.listdir(disk) == []


def test_a_disk_without_direct_writes_is_written_through_the_cache(mount: Callable[[str], Path]) -> None:
    disk = mount("size=16m")
    engine = wide(cases.Solo())
    engine.save(disk / "one")
    engine.load(disk / "one")
    verify(disk / "one")


def test_a_read_only_folder_is_an_error_on_every_rank(mount: Callable[[str], Path]) -> None:
    disk = mount("size=2m,ro")

    def body(world: Group) -> str:
        with pytest.raises(CheckpointError) as caught:
            wide(world).save(disk / "one")
        return str(caught.value)

    said = run_threads(2, body)
    assert said[0] == said[1] and "Read-only file system" in said[0] and f"{disk}/one.tmp-" in said[0]


def test_a_file_in_place_of_the_folder_and_a_folder_of_something_else(tmp_path: Path) -> None:
    engine = wide(cases.Solo())
    (tmp_path / "file").write_text("")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="file is a file"):
        engine.save(tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot make .*file/one.tmp-.*: Not a directory"):
        engine.save(tmp_path / "file" / "one")
    with pytest.raises(CheckpointError, match="used is not empty and not a checkpoint"):
        engine.save(tmp_path / "used")
    assert (tmp_path / "used" / "mine.txt").read_text() == "precious"


def test_a_checkpoint_is_replaced_by_another_of_the_same_name(tmp_path: Path) -> None:
    engine = wide(cases.Solo())
    for step in (1, 2):
        engine.steps = step
        engine.save(tmp_path / "one")
        assert verify(tmp_path / "one").step == step and os.listdir(tmp_path) == ["one"]


def test_a_limit_on_the_size_of_files_is_an_error(tmp_path: Path) -> None:
    """``ulimit -f``, which also sends SIGXFSZ; Python ignores that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"File too large; it needs 15\d+ bytes.*ulimit -f"):
            wide(cases.Solo()).save(tmp_path / "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_device_that_is_always_full() -> None:
    data = torch.zeros(1 << 20, dtype=torch.uint8)
    with pytest.raises(OSError, match="No space left on device") as caught:
        _C.write_file("/dev/full", [(data.data_ptr(), data.nbytes)], [], 4, 1 << 18, True)
    assert caught.value.filename == "/dev/full"


def test_an_error_in_the_background_comes_at_the_next_step_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only rank 1 cannot write; nothing but the exchange of the step tells rank 0."""
    write = saving.write_file

    def fails(path: Path, *rest: Any, **options: Any) -> Any:
        if path.name == "rank-00001.safetensors":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return write(path, *rest, **options)

    monkeypatch.setattr(saving, "write_file", fails)

    def body(world: Group) -> tuple[int, str]:
        engine = cases.make_engine(world, CASE)
        checkpoints = Checkpoints(engine, tmp_path)
        checkpoints.save()
        with pytest.raises(CheckpointError) as caught:
            for _ in range(200):  # as many as the background needs to find out
                checkpoints.after(cases.step(engine))
        assert engine.steps < 200
        checkpoints.finish()  # nothing is under way any more
        return engine.steps, str(caught.value)

    said = run_threads(2, body)
    assert said[0] == said[1]
    assert re.match(r"rank 1: cannot write .*rank-00001.safetensors: Input/output error; the disk reports", said[0][1])
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("kills", [12, pytest.param(100, marks=pytest.mark.full)])
def test_a_process_killed_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, str(KILLER), str(tmp_path / "saves"), str(kills), str(kills)],
        capture_output=True,
        text=True,
        timeout=60 + 3 * kills,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["interrupted"] > kills // 3, "most kills met a save"
    assert said["saves"] > 0
