"""The checkpoints of a run in one folder: when to save, what to keep, where to go on."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..groups.objects import broadcast_object
from .disk import Staging
from .loading import Restored, load
from .saving import TEMPORARY, Saving, file_bytes

if TYPE_CHECKING:
    from ..engine import Engine, Metrics

_NAME = re.compile(r"step-(\d{8,})")
_LEFT = re.compile(rf"step-\d{{8,}}{re.escape(TEMPORARY)}[0-9a-f]+")
REJECTED, ABANDONED = ".rejected", ".abandoned"
"""Ends of the names of checkpoints that are not used any more: damaged ones, and those of steps that are made anew."""


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which checkpoints stay when a new one is there."""

    last: int | None = 2
    """So many of the newest; None: all."""
    every: int | None = None
    """Those whose step is a multiple of this too."""

    def __post_init__(self) -> None:
        for name, value in (("keep", self.last), ("keep_every", self.every)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")

    def spare(self, steps: Sequence[int]) -> list[int]:
        """Those of ``steps`` that may go."""
        newest = sorted(steps) if self.last is None else sorted(steps)[-self.last :]
        return [s for s in sorted(steps) if s not in newest and not (self.every and s % self.every == 0)]


class Checkpoints:
    """Saves an engine every so many steps, keeps the newest, and finds the one to go on from.

    folder: seen by all ranks; a checkpoint is ``step-<updates made>`` in it. every: steps between saves, 0: only when
    ``save`` is called. keep, keep_every: see Keep. asynchronous: a step waits only for a copy to a buffer, which is
    written in the background; one save at a time. All methods are collective.
    """

    def __init__(
        self,
        engine: Engine,
        folder: str | Path,
        *,
        every: int = 0,
        keep: int | None = 2,
        keep_every: int | None = None,
        asynchronous: bool = True,
    ) -> None:
        if every < 0:
            raise ConfigError(f"every must be a number of steps, 0 or more, got {every}")
        self.folder = Path(folder)
        self._engine = engine
        self._every = every
        self._keep = Keep(last=keep, every=keep_every)
        self._asynchronous = asynchronous
        self._staging = Staging()
        self._saving: Saving | None = None
        self._clean = False
        self.last: Mapping[str, Any] | None = None
        """``extra`` of the last save that was begun."""
        if asynchronous and every:
            self._staging.prepare(file_bytes(engine), engine.scope.device)
        self._notice: Callable[[], int] = lambda: self._saving.notices if self._saving is not None else 0
        engine.totals.notices.append(self._notice)

    # -- saving ----------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks. Not collective."""
        return self._saving is not None

    def after(self, metrics: Metrics, extra: Mapping[str, Any] | None = None) -> None:
        """After every step: save when one is due, with ``extra`` (JSON), and go on with the one under way.

        Raises CheckpointError on every rank if a save of an earlier step could not be written.
        """
        if self._saving is not None:
            self._advance(lambda saving: saving.advance(metrics.notices))
        if self._every and not metrics.skipped and self._engine.steps % self._every == 0:
            self.save(extra)

    def save(self, extra: Mapping[str, Any] | None = None, *, wait: bool = False) -> None:
        """Save now, after the one under way is done. wait: until it is written."""
        self.finish()
        self._tidy()
        self.last = extra or {}
        self._saving = Saving(
            self._engine,
            path_of(self.folder, self._engine.steps),
            self.last,
            staging=self._staging,
            background=self._asynchronous and not wait,
            then=self._prune,
        )
        if wait or not self._asynchronous:
            self.finish()

    def finish(self) -> None:
        """Wait until the save under way is done. Raises CheckpointError on every rank if it could not be written."""
        if self._saving is not None:
            self._advance(lambda saving: saving.finish())

    def close(self) -> None:
        """Finish, and give the buffer back."""
        self.finish()
        self._staging.close()
        if self._notice in self._engine.totals.notices:
            self._engine.totals.notices.remove(self._notice)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:  # after an error other ranks may not come
            self.close()

    def _advance(self, move: Callable[[Saving], None]) -> None:
        saving = self._saving
        if saving is None:
            return
        try:
            move(saving)
        finally:
            if saving.done:
                self._saving = None

    def _prune(self) -> None:
        """On rank 0, in the background: remove what is not kept."""
        for step in self._keep.spare(found(self.folder)):
            remove(path_of(self.folder, step))

    def _tidy(self) -> None:
        """Once: remove what interrupted saves left, and set aside what a run wrote that went on from here before, and
        was given up: it would count as newer than what comes."""
        if not self._clean and self._engine.world.rank == 0 and self.folder.is_dir():
            for name in sorted(os.listdir(self.folder)):
                if _LEFT.fullmatch(name):
                    shutil.rmtree(self.folder / name, ignore_errors=True)
            later = [step for step in found(self.folder) if step > self._engine.steps]
            _set_aside([path_of(self.folder, step) for step in later], ABANDONED)
        self._clean = True

    # -- going on --------------------------------------------------------------------------------

    def resume(self) -> Restored | None:
        """Load the newest checkpoint that is whole and fits; None if there is none at all.

        Those that were rejected are told in the notes, and renamed to ``....rejected``. Raises CheckpointError on
        every rank if there are some and none can be loaded.
        """
        world = self._engine.world
        steps = broadcast_object(world, found(self.folder) if world.rank == 0 else [])
        rejected: list[tuple[Path, str]] = []
        for step in reversed(steps):
            folder = path_of(self.folder, step)
            try:
                restored = load(self._engine, folder)
            except CheckpointError as error:
                rejected.append((folder, str(error)))
                continue
            if world.rank == 0:
                _set_aside([path for path, _ in rejected], REJECTED)
            said = tuple(f"rejected {path.name}: {text}" for path, text in rejected)
            return replace(restored, notes=(*said, *restored.notes))
        if rejected:
            reasons = "\n".join(f"{path.name}: {text}" for path, text in rejected)
            raise CheckpointError(f"none of the checkpoints in {self.folder} can be loaded:\n{reasons}")
        return None


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}"


def found(folder: Path) -> list[int]:
    """Steps of the checkpoints of a folder, ascending."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint: first its name, so that half of one is never found."""
    doomed = checkpoint.with_name(f"{checkpoint.name}{TEMPORARY}{secrets.token_hex(4)}")
    with suppress(OSError):
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(folders: Sequence[Path], ending: str) -> None:
    for folder in folders:
        target = folder.with_name(folder.name + ending)
        with suppress(OSError):
            shutil.rmtree(target, ignore_errors=True)
            os.rename(folder, target)
