"""What a run leaves behind: the run directory, config.toml, metrics.jsonl, the plot."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

import torch

from . import __version__
from .boot import World
from .config import to_toml
from .data import Data
from .data.tokenizers import CHARACTERS, TOKENIZER
from .engine import Metrics
from .errors import ConfigError
from .evaluation import NOT_EVALUATED, Evaluation
from .liveline import LiveLine, Pace, duration, plural
from .measured import Figures
from .plan import Plan
from .plot import PlotUnavailableError, plot_losses
from .sinks import Sink, close_sinks, open_sinks

FILES = ("config.toml", "metrics.jsonl", "timeline.json", "loss.svg", "loss.png", CHARACTERS, TOKENIZER)
"""Everything a run writes; ``run.overwrite`` removes these and nothing else."""


def check_run_dir(wanted: str | None, overwrite: bool, *, goes_on: bool = False) -> None:
    """Raise ConfigError for a folder that holds something, unless ``overwrite`` or ``goes_on``; touches nothing."""
    if wanted is None or goes_on:
        return
    path = Path(wanted).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"run.dir = {wanted!r} is a file; give a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ConfigError(
            f"run.dir = {wanted!r} is not empty; give another folder, or run.overwrite = true to replace "
            f"{', '.join(FILES)} in it, or run.resume = 'auto' to go on with that run"
        )


def make_run_dir(wanted: str | None, overwrite: bool, parent: Path = Path("runs")) -> Path:
    """Create the folder of a run: ``wanted``, or a new one named after the time below ``parent``.

    Raises ConfigError for a folder that is not empty, unless ``overwrite``: then the files of an
    earlier run are removed from it, and nothing else.
    """
    check_run_dir(wanted, overwrite)
    try:
        if wanted is None:
            return _new_by_time(parent)
        path = Path(wanted).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            (path / name).unlink(missing_ok=True)
        return path
    except OSError as error:
        raise ConfigError(
            f"run.dir = {wanted or str(parent)!r} cannot be made: {error.strerror}; give a folder to write to"
        ) from None


def _new_by_time(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1, 1000):
        path = parent / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            continue
    raise ConfigError(f"{parent} already holds 999 runs named {stamp}; give run.dir")


class MetricsFile:
    """One JSON object a line, on disk when ``write`` returns. Numbers that are not finite become null.

    records: of a file that is there, so many stay at the beginning; None: there must be none.
    """

    def __init__(self, path: Path, records: int | None = None) -> None:
        if records is not None:
            _keep_lines(path, records)
        self._file = path.open("x" if records is None else "a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def _keep_lines(path: Path, count: int) -> None:
    """The first ``count`` whole lines of a file that may not be there."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    rest = path.with_suffix(".rest")
    rest.write_text("".join(line for line in lines[:count] if line.endswith("\n")), encoding="utf-8")
    rest.replace(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl, in order."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Result:
    """What ``train`` reports; the same on every rank, except that only rank 0 knows ``folder``."""

    folder: Path | None
    first_loss: float
    last_loss: float
    evaluation: Evaluation | None
    """The last evaluation; None if there was none."""
    seconds: float
    peak_bytes: tuple[dict[str, int], ...]
    """Highest bytes by class of memory, and of all together (``total``), for every rank."""
    foreseen: str = ""
    """How near the estimate of the memory came; of rank 0."""
    stopped: str | None = None
    """What ended the run before its last step."""

    @property
    def held_out_loss(self) -> float | None:
        """Of the last evaluation."""
        return None if self.evaluation is None else self.evaluation.loss


class Log(Protocol):
    """Takes what happens; every rank has one."""

    @property
    def folder(self) -> Path | None: ...

    def step(
        self,
        metrics: Metrics,
        seconds: float,
        memory: Mapping[str, int],
        evaluation: Evaluation | None,
        pipeline: Figures | None = None,
        spent: Mapping[str, float] | None = None,
    ) -> None: ...

    def say(self, text: str) -> None:
        """A line for people."""

    def finish(self, result: Result) -> None: ...

    def __enter__(self) -> object: ...

    def __exit__(self, *error: object) -> bool | None: ...


class Silent:
    """The log of every rank but 0."""

    folder: Path | None = None

    def step(
        self,
        metrics: Metrics,
        seconds: float,
        memory: Mapping[str, int],
        evaluation: Evaluation | None,
        pipeline: Figures | None = None,
        spent: Mapping[str, float] | None = None,
    ) -> None: ...

    def say(self, text: str) -> None: ...

    def finish(self, result: Result) -> None: ...

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True)
class GoesOn:
    """A run that does not begin at the beginning."""

    folder: Path | None = None
    """Run directory that is used again; None: a new one."""
    records: int = 0
    """Steps that were tried before: so many lines of metrics.jsonl stay."""
    notes: Sequence[str] = ()


class RunLog(AbstractContextManager["RunLog"]):
    """The log of rank 0: run directory, metrics.jsonl, the sinks, the live line and the plot."""

    def __init__(
        self,
        plan: Plan,
        data: str,
        world: World,
        out: TextIO,
        sinks: Sequence[Sink] = (),
        goes_on: GoesOn | None = None,
    ) -> None:
        self._plan = plan
        run, t, before = plan.config.run, plan.config.train, goes_on or GoesOn()
        self.folder: Path = before.folder or make_run_dir(run.dir, run.overwrite)
        head = f"triloom {__version__}: {world.size} ranks, mesh {plan.mesh}, torch {torch.__version__}"
        (self.folder / "config.toml").write_text(to_toml(plan.config, head), encoding="utf-8")
        self._metrics = MetricsFile(self.folder / "metrics.jsonl", before.records if before.folder else None)
        kept = read_metrics(self.folder / "metrics.jsonl")[-1:]
        first = sum(r["step"] + (not r["skipped"]) for r in kept)  # the first step that is to come
        self._sinks = [self._metrics.write, *open_sinks(plan.config, self.folder, first), *sinks]
        self._line = LiveLine(out, t.steps, t.log_every)
        self._tokens = self._before = plan.tokens_per_step * before.records
        self._steps_done = 0
        self._pace = Pace(t.steps)
        for text in (*headline(plan, data, world), *before.notes):
            self._line.say(text)

    def step(
        self,
        metrics: Metrics,
        seconds: float,
        memory: Mapping[str, int],
        evaluation: Evaluation | None,
        pipeline: Figures | None = None,
        spent: Mapping[str, float] | None = None,
    ) -> None:
        self._tokens += self._plan.tokens_per_step
        self._steps_done += not metrics.skipped
        speed = self._plan.tokens_per_step / seconds
        record = {
            "step": metrics.step,
            "loss": metrics.loss,
            "grad_norm": metrics.grad_norm,
            "lr": metrics.lr,
            "skipped": metrics.skipped,
            "loss_scale": metrics.scale,
            "tokens": self._tokens,
            "tokens_per_s": speed,
            "step_ms": seconds * 1e3,
            "peak_bytes": dict(memory),
            **(NOT_EVALUATED if evaluation is None else evaluation.as_dict()),
            "pipeline": None if pipeline is None else pipeline.as_dict(),
            "seconds": dict(spent or {}),
        }
        for sink in self._sinks:
            sink(record)
        self._line.step(metrics.step + 1, metrics.loss, speed, self._pace.left(metrics.step + 1, seconds))
        if metrics.skipped:
            self._line.say(f"skipped, no weight changed: {metrics.note}")
        if evaluation is not None:
            after = plural(metrics.step + 1, "step")
            self._line.say(f"held-out loss {evaluation.loss:.4f} after {after}: {evaluation}")

    def say(self, text: str) -> None:
        self._line.say(text)

    def finish(self, result: Result) -> None:
        speed = (self._tokens - self._before) / result.seconds
        how = "trained" if result.stopped is None else f"stopped by {result.stopped} after"
        self._line.say(
            f"{how} {plural(self._steps_done, 'step')} in {duration(result.seconds)}: "
            f"loss {result.first_loss:.4f} -> {result.last_loss:.4f}, {speed:,.0f} tokens/s over all"
        )
        largest = max(result.peak_bytes, key=lambda one: one["total"])
        by_class = ", ".join(f"{kind} {size / 2**20:.1f}" for kind, size in largest.items())
        self._line.say(f"memory of the largest rank, MiB: {by_class}")
        if result.foreseen:
            self._line.say(result.foreseen)
        measured = ["timeline.json"] if (self.folder / "timeline.json").exists() else []
        written = ["config.toml", "metrics.jsonl", *measured, *(self._plot() if self._plan.config.run.plot else [])]
        self._line.say(f"{self.folder}: {' '.join(written)}")
        if result.stopped is not None:
            self._line.say(f"triloom train --resume {self.folder} goes on")

    def _plot(self) -> list[str]:
        points = [(r["step"], r["loss"]) for r in read_metrics(self.folder / "metrics.jsonl") if r["loss"] is not None]
        curves = {f"training, mesh {self._plan.mesh}": points}
        try:
            return [path.name for path in plot_losses(curves, self.folder, f"{self.folder.name}: loss")]
        except PlotUnavailableError as error:
            self._line.say(str(error))
            return []

    def __exit__(self, *error: object) -> None:
        self._line.close()
        self._metrics.__exit__(None, None, None)
        close_sinks(self._sinks)


def keep_tokenizer(data: Data, folder: Path | None) -> None:
    """Write the tokenizer, if it is a file, to the run directory ``folder`` (None on ranks that have none)."""
    file = None if data.tokenizer is None else data.tokenizer.file
    if folder is not None and file is not None:
        (folder / file[0]).write_text(file[1], encoding="utf-8")


def open_log(
    plan: Plan, data: str, world: World, out: TextIO, sinks: Sequence[Sink] = (), goes_on: GoesOn | None = None
) -> Log:
    """The log of this rank; raises ConfigError if rank 0 cannot make the run directory."""
    return Silent() if world.rank else RunLog(plan, data, world, out, sinks, goes_on)


def headline(plan: Plan, data: str, world: World) -> list[str]:
    """What is about to be trained, in two lines."""
    config, m = plan.config, plan.config.model
    return [
        f"{m.shape}, {plural(m.layers, 'layer')} x {m.hidden} wide, {plan.decoder.parameters:,} parameters, on {data}",
        f"{plural(world.size, 'rank')} as {plan.mesh} ({config.placement.name}, {plan.order.name}, "
        f"microbatches: {plan.microbatches}), {plural(world.threads, 'thread')} each, {world.device.type}",
    ]
