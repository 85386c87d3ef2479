"""Where the numbers of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, a user's own function.

A sink is a function of one record, the object of a line of metrics.jsonl; one with a method ``close`` is
closed at the end of the run. Only rank 0 has sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import Config
from .config.schema import LogConfig
from .errors import ConfigError

Sink = Callable[[Mapping[str, Any]], None]
"""Takes the record of a step: ``step``, ``loss``, ``grad_norm``, ``lr``, ..., as metrics.jsonl has them."""

Scalar = int | float


class TensorBoard:
    """Events for TensorBoard, a scalar for every number of a record.

    A run that goes on drops the earlier events of steps from ``first`` on; a new one those of a run it overwrites.
    """

    def __init__(self, folder: Path, config: Config, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        place = folder / "tensorboard"
        for old in place.glob("events.out.tfevents.*") if first == 0 else ():
            old.unlink()
        self._writer = SummaryWriter(str(place), purge_step=first or None)

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """An offline run of Weights & Biases; ``wandb sync`` sends it."""

    def __init__(self, folder: Path, config: Config, first: int) -> None:
        import wandb

        self._run: Any = wandb.init(
            mode="offline", project="triloom", name=folder.name, dir=str(folder), config=asdict(config)
        )

    def __call__(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


SINKS: Mapping[str, Callable[[Path, Config, int], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb}
"""Key of [log] -> the sink it opens. The package that a sink needs has the name of its key."""


def check_sinks(log: LogConfig) -> None:
    """Raise ConfigError for a sink whose package is not installed."""
    missing = [name for name in _wanted(log) if find_spec(name) is None]
    if missing:
        keys = " and ".join(f"log.{name} = true" for name in missing)
        raise ConfigError(
            f"{keys}: {' and '.join(missing)} is not installed on rank 0; pip install 'triloom[log]', or leave it out"
        )


def open_sinks(config: Config, folder: Path, first: int = 0) -> list[Sink]:
    """The sinks that ``[log]`` asks for, writing below the run directory. first: the first step to come."""
    return [SINKS[name](folder, config, first) for name in _wanted(config.log)]


def close_sinks(sinks: Sequence[Sink]) -> None:
    for sink in sinks:
        close = getattr(sink, "close", None)
        if close is not None:
            close()


def scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """The numbers of a record but its step, those of inner objects as ``outer/inner``; what is missing is left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, Scalar) and prefix + name != "step":
            yield prefix + name, value


def _wanted(log: LogConfig) -> list[str]:
    return [name for name in SINKS if getattr(log, name)]
