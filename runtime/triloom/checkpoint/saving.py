"""Writing a checkpoint: every rank its file, then rank 0 the manifest and the one rename that makes it exist.

A save goes through three stages, and what it does in the background does not communicate::

    writing     every rank: its file and a note of what is in it, into a temporary folder
    committing  rank 0: the manifest, the rename
    done

The ranks move on together, when all have told each other that none is busy: with a bit in the exchange that every
step has anyway (``Checkpoints``), or with a small exchange of its own (:meth:`Saving.finish`).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _C
from ..errors import CheckpointError, ConfigError
from ..groups.objects import broadcast_object, gather_objects
from ..together import together
from . import content
from .disk import Staging, copy_in, crc32c, explain, explained, free_bytes, sync_folder, write_file, write_text
from .layout import Entry, FileLayout, lay_out
from .manifest import NAME, Manifest, Stored, block_sizes, merge, piece_json, to_text

if TYPE_CHECKING:
    from ..engine import Engine
    from ..parallel.pieces import StatePiece

TEMPORARY = ".tmp-"
PENDING, FAILED = 1, 2
"""What a rank tells the others: it is busy; its part could not be written."""


def save(engine: Engine, folder: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write all of the engine's state to a new ``folder``, which every rank must see; collective, between steps.

    extra: JSON values that ``load`` gives back; those of rank 0 count. The folder appears complete or not at all; a
    checkpoint that is there is replaced. Raises CheckpointError on every rank.
    """
    staging = Staging()
    try:
        Saving(engine, Path(folder), extra or {}, background=False, staging=staging).finish()
    finally:
        staging.close()


def file_bytes(engine: Engine) -> int:
    """Size of the file that this rank would write now."""
    return lay_out([_entry(p) for p in content.written(engine)]).nbytes


class Saving:
    """A save under way. Building it is collective and takes the state as it is now; the steps may go on after it.

    staging: the buffer that the state is copied to where it cannot be written in place. background: copy everything
    and return at once; :meth:`advance` must then be called with what all ranks say. then: what rank 0 does when the
    checkpoint is there.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        extra: Mapping[str, Any],
        *,
        staging: Staging,
        background: bool,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self._then = then
        self.step = engine.steps
        self.stage: Callable[[], None] | None = self._committing
        """What to do when no rank is busy; None: all is done."""
        self._world = engine.world
        self._mesh = dict(engine.mesh.axes)
        self._extra = _as_json(extra)
        self._background = background
        self._task: threading.Thread | None = None
        self._error: str | None = None
        self._numbers = content.numbers(engine)
        self._layout_print = content.layout_print(engine)
        self._pieces = content.written(engine)
        self._entries = [_entry(p) for p in self._pieces]
        self._layout = lay_out(self._entries)
        self._temporary = self._prepare()
        spans = self._take(staging, engine.scope.device)
        self._run(lambda: self._write(spans))

    # -- moving on -------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.stage is None

    @property
    def notices(self) -> int:
        """PENDING and FAILED of this rank."""
        busy = self._task is not None and self._task.is_alive()
        return PENDING * busy | FAILED * (self._error is not None and not busy)

    def advance(self, notices: int) -> None:
        """Go on as far as the bits of all ranks, joined, allow. Raises CheckpointError on every rank if one failed."""
        if self.stage is None or notices & PENDING:
            return
        if self._task is not None:
            self._task.join()
            self._task = None
        if notices & FAILED:
            self._fail()
        self.stage()

    def finish(self) -> None:
        """Wait for the rest; collective."""
        while self.stage is not None:
            if self._task is not None:
                self._task.join()
            mine = torch.tensor([float(self.notices)], dtype=torch.float64)
            everyone = mine.new_empty(self._world.size)
            self._world.all_gather(everyone, mine).wait()
            notices = 0
            for bits in everyone.tolist():
                notices |= int(bits)
            self.advance(notices)

    def _fail(self) -> None:
        self.stage = None
        everyone = gather_objects(self._world, self._error)
        if self._world.rank == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        failed = [r for r, text in enumerate(everyone) if text is not None]
        raise CheckpointError(f"rank {self._world.members[failed[0]]}: {everyone[failed[0]]}")

    def _committing(self) -> None:
        self.stage = self._finished
        if self._world.rank == 0:
            self._run(self._commit)

    def _finished(self) -> None:
        self.stage = None

    def _run(self, work: Callable[[], None]) -> None:
        def body() -> None:
            try:
                work()
            except CheckpointError as error:
                self._error = str(error)
            except OSError as error:
                self._error = explain("cannot write", Path(error.filename or self._temporary), error)
            except Exception as error:  # of a thread: it must reach every rank, not end unseen
                self._error = f"{type(error).__name__}: {error}"

        if self._background:
            self._task = threading.Thread(target=body, name="triloom-checkpoint")  # waited for at exit: it reads memory
            self._task.start()
        else:
            body()

    # -- stages ----------------------------------------------------------------------------------

    def _prepare(self) -> Path:
        """Make the temporary folder, see that it can hold everything, and that every rank sees it."""
        suffix = broadcast_object(self._world, secrets.token_hex(4))
        temporary = self.folder.with_name(f"{self.folder.name}{TEMPORARY}{suffix}")
        needed = sum(gather_objects(self._world, self._layout.nbytes))

        def make() -> None:
            if self._world.rank == 0:
                check_target(self.folder)
                with explained("cannot make", temporary, needed):
                    temporary.mkdir(parents=True)
                free = free_bytes(temporary)
                if isinstance(free, int) and free < needed:
                    raise CheckpointError(
                        f"a checkpoint in {self.folder.parent} needs {needed} bytes, {free} are free; free some space, "
                        "keep fewer checkpoints, or write to another disk"
                    )

        def see() -> None:
            if not temporary.is_dir():
                raise CheckpointError(
                    f"{temporary}, which rank 0 made, is not there on this rank; checkpoints need a folder that all "
                    "ranks share"
                )

        try:
            together(self._world, make, CheckpointError)
            together(self._world, see, CheckpointError)
        except CheckpointError:
            if self._world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return temporary

    def _take(self, staging: Staging, device: torch.device) -> list[torch.Tensor]:
        """The contents of the file: views of the state itself, or copies that the next step leaves alone."""
        header = torch.frombuffer(bytearray(self._layout.header), dtype=torch.uint8)
        in_place = not self._background and device.type == "cpu"
        if in_place:
            return [header, *(self._pieces[i].flat for i in self._layout.order)]
        room = staging.room(self._layout.nbytes, device)
        copy_in(room, [(0, header), *((at, p.flat) for at, p in zip(self._layout.offsets, self._pieces, strict=True))])
        self._pieces = []  # the next step changes them
        return [room[: self._layout.nbytes]]

    def _write(self, spans: list[torch.Tensor]) -> None:
        """This rank's file, and the note of what is in it."""
        rank = self._world.rank
        report: dict[str, Any] = {"tensors": [], "layout": self._layout_print, "missed": self._numbers["missed"]}
        if self._entries:
            file = f"rank-{rank:05d}.safetensors"
            extents, first = _extents(self._entries, self._layout)
            with explained("cannot write", self._temporary / file, self._layout.nbytes):
                checksums, _ = write_file(self._temporary / file, spans, extents)
            report |= {"file": file, "bytes": self._layout.nbytes, "header": len(self._layout.header)}
            report["crc32c"] = checksums[0]
            for entry, offset, at in zip(self._entries, self._layout.offsets, first, strict=True):
                own = tuple(checksums[at : at + len(block_sizes(entry.nbytes))])
                stored = Stored(file, offset, entry.part, own)
                itemsize = entry.nbytes // entry.part.numel
                report["tensors"].append([entry.tensor, entry.code, list(entry.shape), piece_json(stored, itemsize)])
        with explained("cannot write", self._temporary / _note(rank)):
            write_text(self._temporary / _note(rank), json.dumps(report), lasting=False)

    def _commit(self) -> None:
        """Rank 0: join the notes to the manifest, and give the folder its name."""
        notes = [self._temporary / _note(rank) for rank in range(self._world.size)]
        reports = [json.loads(note.read_text(encoding="utf-8")) for note in notes]
        files, tensors = merge(reports)
        state = self._numbers | {"missed": {n: c for r in reports for n, c in sorted(r["missed"].items())}}
        manifest = Manifest(
            step=self.step,
            mesh=self._mesh,
            model=content.model_print(tensors),
            layouts=tuple(r["layout"] for r in reports),
            state=state,
            extra=self._extra,
            files=files,
            tensors=tensors,
        )
        for note in notes:
            note.unlink()
        with explained("cannot write", self._temporary / NAME):
            write_text(self._temporary / NAME, to_text(manifest, crc32c))
            sync_folder(self._temporary)
        with explained("cannot rename", self._temporary):
            replace_folder(self._temporary, self.folder)
            sync_folder(self.folder.parent)
        self._then()


def check_target(folder: Path) -> None:
    """Raise CheckpointError unless ``folder`` is new, empty or a checkpoint, which will be replaced."""
    with explained("cannot use", folder):
        there = folder.exists()
        if there and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file; give a folder for the checkpoint")
        if there and not (folder / NAME).exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty and not a checkpoint; give another folder")


def replace_folder(new: Path, name: Path) -> None:
    """Give a folder its name; what had that name before is removed. At no time is there nothing of that name."""
    if not name.exists():
        os.rename(new, name)
        return
    if not _C.exchange_paths(str(new), str(name)):  # a file system that cannot: one moment without either
        old = name.with_name(f"{name.name}{TEMPORARY}{secrets.token_hex(4)}")
        os.rename(name, old)
        os.rename(new, name)
        new = old
    shutil.rmtree(new, ignore_errors=True)


def _as_json(extra: Mapping[str, Any]) -> Any:
    """As it will be read again: keys are strings, tuples lists."""
    try:
        return json.loads(json.dumps(extra, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"extra must be JSON ({error}): numbers that are finite, strings, lists, dicts") from None


def _note(rank: int) -> str:
    return f"note-{rank:05d}.json"


def _entry(piece: StatePiece) -> Entry:
    return Entry(piece.tensor, str(piece.flat.dtype).removeprefix("torch."), piece.shape, piece.part)


def _extents(entries: list[Entry], layout: FileLayout) -> tuple[list[tuple[int, int]], list[int]]:
    """Ranges of the file behind one checksum each, the header first; and the first one of each entry."""
    extents, first = [(0, len(layout.header))], [0] * len(entries)
    for i in layout.order:
        first[i] = len(extents)
        at = layout.offsets[i]
        for size in block_sizes(entries[i].nbytes):
            extents.append((at, size))
            at += size
    return extents, first


if _C.FILE_ALIGN != 4096:
    raise RuntimeError("layout.ALIGN and the native writer disagree")
