"""The checkpoints of a training run: where it goes on, what is stored besides the engine's state, when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .boot import World
from .checkpoint import Checkpoints, Restored
from .checkpoint.manifest import NAME
from .checkpoint.series import found
from .config import Config
from .engine import Engine, Metrics
from .errors import ConfigError
from .groups.objects import broadcast_object
from .runlog import GoesOn
from .stopping import STOP, Stop
from .together import together

AUTO = "auto"
FOLDER = "checkpoints"
"""In a run directory."""


@dataclass(frozen=True)
class Start:
    """Where a run begins. Plain values, so that rank 0 can tell the others."""

    source: str | None = None
    """A checkpoint, or a folder of them; None: the beginning."""
    run: str | None = None
    """The run directory that is continued; None: a new one."""

    @property
    def series(self) -> bool:
        """Whether ``source`` is a folder of checkpoints."""
        return self.source is not None and not (Path(self.source) / NAME).exists()


def find_start(config: Config) -> Start:
    """Where ``run.resume`` says the run goes on. Raises ConfigError if there is nothing to go on from."""
    wanted, run = config.run.resume, config.run.dir
    if wanted is None:
        return Start()
    if wanted == AUTO:
        if run is None:
            raise ConfigError("run.resume = 'auto' goes on in run.dir, which is not given; give it, or a path instead")
        place = Path(run).expanduser()
        begun = any((place / name).exists() for name in ("metrics.jsonl", FOLDER))
        if not begun and place.is_dir() and any(place.iterdir()):
            raise ConfigError(f"run.dir = {run!r} is not empty and not a run; give another folder")
        return Start(str(checkpoint_folder(config, place)), run)
    path = Path(wanted).expanduser()
    if not path.is_dir():
        raise ConfigError(f"run.resume = {wanted!r} is not a folder; give a run directory or a checkpoint")
    if (path / NAME).exists() or found(path):
        return Start(str(path), _own_or_new(run, path))
    inside = checkpoint_folder(config, path)
    if not found(inside):
        raise ConfigError(f"run.resume = {wanted!r} holds no checkpoint; {inside} should hold some, called step-...")
    return Start(str(inside), str(path) if run is None else _own_or_new(run, inside))


def _own_or_new(run: str | None, source: Path) -> str | None:
    """The run directory to go on in. Raises ConfigError for that of another run."""
    if run is None:
        return None
    place = Path(run).expanduser()
    if place.resolve() in source.resolve().parents[:2] or not place.exists() or not any(place.iterdir()):
        return run
    raise ConfigError(
        f"run.dir = {run!r} is not empty, and {source} is not in it; give a new folder, or leave run.dir out"
    )


def checkpoint_folder(config: Config, run: Path) -> Path:
    """Of the run in the directory ``run``."""
    return Path(config.checkpoint.dir).expanduser() if config.checkpoint.dir else run / FOLDER


def go_on(engine: Engine, config: Config, world: World, digest: str) -> tuple[Restored | None, GoesOn | None]:
    """Load what ``run.resume`` asks for, and the run directory that is used again (on rank 0); collective.

    digest: of the data. Raises SetupError or CheckpointError on every rank.
    """
    start = together(world.group, lambda: find_start(config) if world.rank == 0 else Start())
    restored = _restore(engine, start, world)
    folder = None if start.run is None else Path(start.run).expanduser()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    if restored is None:
        return None, None if folder is None else GoesOn(folder)
    return restored, GoesOn(folder, _count(restored, "records", restored.step), _notes(restored, digest))


def _restore(engine: Engine, start: Start, world: World) -> Restored | None:
    source, series = broadcast_object(world.group, [start.source, start.series])
    if source is None:
        return None
    if not series:
        return engine.load(source)
    with Checkpoints(engine, source) as checkpoints:
        return checkpoints.resume()


def _count(restored: Restored, key: str, otherwise: int) -> int:
    """A number that this module stored; a checkpoint from a loop of one's own has none."""
    return int(restored.extra.get(key, otherwise))


def _notes(restored: Restored, digest: str) -> list[str]:
    out = [f"goes on after step {restored.step} of {restored.folder}", *restored.notes]
    if restored.extra.get("data", digest) != digest:
        out.append("the data is not that of the checkpoint: samples are taken from the same position of other data")
    return out


class RunCheckpoints:
    """Saves of one run, and its end when it is told to stop. Collective.

    folder: the run directory, known to rank 0. digest: of the data. restored: where the run went on.
    """

    def __init__(
        self, config: Config, engine: Engine, folder: Path | None, world: World, digest: str, restored: Restored | None
    ) -> None:
        c = config.checkpoint
        run = broadcast_object(world.group, None if folder is None else str(folder.absolute()))
        self.folder = checkpoint_folder(config, Path(run))
        step = 0 if restored is None else restored.step
        self.records = 0 if restored is None else _count(restored, "records", step)
        """Steps that were tried, skipped ones included: the lines of metrics.jsonl."""
        self.position = 0 if restored is None else _count(restored, "samples", step * config.train.batch)
        """First sample that no step has used."""
        self.stopped: str | None = None
        """Why the run ends early; None: it does not."""
        self._begun = -1 if restored is None else self.records
        self._last_too = c.every > 0
        self._constant = {"config": asdict(config), "data": digest}
        self._checkpoints = Checkpoints(
            engine, self.folder, every=c.every, keep=c.keep, keep_every=c.keep_every, asynchronous=c.asynchronous
        )
        self._stop = Stop(speak=world.rank == 0)
        engine.totals.notices.append(self._stop.notice)

    def after(self, metrics: Metrics, position: int) -> bool:
        """After each step: save when due. Whether the run is to end now, its state saved."""
        self.records += 1
        self.position = position
        self._checkpoints.after(metrics, self._extra())
        if metrics.notices & STOP:
            self._save()
            self.stopped = self._stop.signal or "a signal to another rank"
        return self.stopped is not None

    def finish(self) -> None:
        """At the end of the run: the last state is saved too, where any is."""
        if self._last_too and self.stopped is None:
            self._save()
        self._checkpoints.finish()

    def _save(self) -> None:
        """Now, unless that has been done."""
        last = self._checkpoints.last
        if self.records != (self._begun if last is None else last["records"]):
            self._checkpoints.save(self._extra(), wait=True)
        self._checkpoints.finish()

    def _extra(self) -> Mapping[str, Any]:
        return {**self._constant, "samples": self.position, "records": self.records}

    def __enter__(self) -> RunCheckpoints:
        self._stop.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.__exit__(*error)
        self._checkpoints.__exit__(*error)
