"""The measured side of a run: figures of every step, and the last steps as timeline.json."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from .engine import Engine
from .groups.base import Group
from .measured import BEGIN, END, Figures, Measurement, measurement
from .spans import STAMPS, DeviceSpans, Offsets, Spans, align, clock_offsets, gather_rows
from .trace import Step, Trace, save


class Timing(Protocol):
    """Measures the steps of an engine; every rank has one of the same kind."""

    def step(self, number: int) -> Figures | None:
        """After each step, on every rank: the figures of its pipeline, the same everywhere; None if not measured."""

    def finish(self, folder: Path | None) -> Path | None:
        """At the end, on every rank: write timeline.json where there is a folder; returns its path."""


class Untimed:
    """Nothing was recorded."""

    def step(self, number: int) -> Figures | None:
        return None

    def finish(self, folder: Path | None) -> Path | None:
        return None


class Timed:
    """Spans of every step, gathered after it.

    keep: how many of the last steps go to timeline.json. Made before the first step, when it measures
    the clocks; collective, as all of its methods.
    """

    def __init__(self, engine: Engine, spans: Spans | DeviceSpans, world: Group, keep: int) -> None:
        self._spans = spans
        self._world = world
        self._mesh = str(engine.mesh)
        self._engine = engine
        self._measurement = measured_by(engine)
        self._kept: deque[tuple[int, torch.Tensor, Figures]] = deque(maxlen=keep)
        self._clocks: Offsets = clock_offsets(world)

    def step(self, number: int) -> Figures | None:
        if self._engine.program is not self._measurement.program:  # it was chosen after the step before
            self._measurement = measured_by(self._engine)
            self._kept.clear()
        rows = gather_rows(self._world, self._spans.rows(), self._measurement.most)
        figures = self._measurement.figures(align(rows, self._clocks))
        if self._kept and self._kept[-1][0] == number:  # the same step again: the one before was skipped
            self._kept.pop()
        self._kept.append((number, rows, figures))
        return figures

    def finish(self, folder: Path | None) -> Path | None:
        last = clock_offsets(self._world)
        if folder is None or not self._kept:
            return None
        aligned = [(number, align(rows, self._clocks, last), figures) for number, rows, figures in self._kept]
        first = min(int(times[..., BEGIN][times[..., END] > 0].min()) for _, times, _ in aligned)
        for _, times, _ in aligned:
            for column in STAMPS:
                times[..., column] -= np.where(times[..., column] == 0, 0, first)
        steps = tuple(Step(number, times, figures) for number, times, figures in aligned)
        errors = tuple(max(a, b) / 1e3 for a, b in zip(self._clocks.error_ns, last.error_ns, strict=True))
        return save(Trace(self._measurement, steps, self._mesh, errors), folder)


def measured_by(engine: Engine) -> Measurement:
    """What an engine runs now, and where its ranks sit: the same on every rank."""
    return measurement(engine.program, engine.stage_units, engine.mesh)


def make_timing(engine: Engine, spans: Spans | DeviceSpans | None, world: Group, keep: int) -> Timing:
    """For spans, :class:`Timed`; collective then."""
    return Untimed() if spans is None else Timed(engine, spans, world, keep)
