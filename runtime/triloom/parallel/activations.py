"""Bytes that autograd keeps from a unit's forward to its backward, measured once and then counted."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Activations:
    """Live and peak bytes of saved tensors on one rank.

    A unit's bytes are measured at its first forward for each batch signature (each storage once,
    parameters left out) through saved-tensor hooks, and only counted afterwards: no cost per step.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._bytes: dict[tuple[int, Hashable], int] = {}

    @contextmanager
    def forward(self, unit: Any, signature: Hashable) -> Iterator[None]:
        """Around the forward of a unit (an ``executor.UnitRun``)."""
        key = (unit.index, signature)
        if key in self._bytes:
            yield
        else:
            own = {p.untyped_storage().data_ptr() for p in unit.module.parameters()}
            seen: dict[int, int] = {}

            def note(t: torch.Tensor) -> torch.Tensor:
                storage = t.untyped_storage()
                if storage.data_ptr() not in own:
                    seen[storage.data_ptr()] = storage.nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                yield
            self._bytes[key] = sum(seen.values())
        self.live += self._bytes[key]
        self.peak = max(self.peak, self.live)

    def release(self, unit: Any, signature: Hashable) -> None:
        """After the unit's backward."""
        self.live -= self._bytes[unit.index, signature]
