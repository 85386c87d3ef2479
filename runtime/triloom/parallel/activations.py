"""Bytes that computes hold between actions: measured once for each unit and batch shape, then counted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from ..memory import Ledger, Lives, UnitBytes
from .cut import Boundary, Pass

Run = Callable[[], tuple[Boundary, Pass]]

Storages = dict[int, int]
"""Bytes of storages, by identity."""


def storages(tensors: Iterable[Any]) -> Storages:
    """Each storage once; what is no tensor is left out."""
    out: Storages = {}
    for t in tensors:
        if isinstance(t, torch.Tensor):
            s = t.untyped_storage()
            out[s._cdata] = s.nbytes()
    return out


@contextmanager
def saved_tensors() -> Iterator[list[torch.Tensor]]:
    """What autograd saves inside the ``with``."""
    seen: list[torch.Tensor] = []

    def note(t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield seen


def unit_bytes(module: nn.Module, saved: Iterable[torch.Tensor], given: Iterable[Any], out: Boundary) -> UnitBytes:
    """Of one forward with a graph. given: what the unit was called with, which it does not hold alone."""
    made = storages(out.tensors())
    foreign = {**made, **storages(given), **storages([*module.parameters(), *module.buffers()])}
    kept = storages(saved)
    return UnitBytes(
        held=sum(n for key, n in kept.items() if key not in foreign),
        output=sum(made.values()),
        saved_output=sum(n for key, n in made.items() if key in kept),
        carriers=sum(t.nbytes for t in out.carriers()),
    )


def closure_bytes(module: nn.Module, writers: Iterable[Any]) -> int:
    """What closures that compute weight gradients keep alive."""
    own = storages([*module.parameters(), *module.buffers()])
    return sum(n for key, n in storages(_captured(list(writers))).items() if key not in own)


def _captured(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Tensors captured by functions, and by tuples and dataclasses in them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _captured(value)
        elif is_dataclass(value) and not isinstance(value, type):
            yield from _captured([getattr(value, f.name) for f in fields(value)])
        else:
            cells = getattr(value, "__closure__", None) or ()
            yield from _captured([c.cell_contents for c in cells])


@dataclass(slots=True)
class _Step:
    signatures: Sequence[Hashable]
    training: bool


class Activations:
    """What the computes of one rank hold, in the ledger.

    A unit's bytes are measured at its first forward (and first deferring backward) for each batch signature, each
    storage once, parameters left out; afterwards they are only counted.
    """

    def __init__(self, ledger: Ledger, last: int, *, flops: bool = False) -> None:
        self._ledger, self._flops = ledger, flops
        self.measured: dict[tuple[int, Hashable], UnitBytes] = {}
        """By unit and batch signature."""
        self._complete: set[tuple[int, Hashable]] = set()
        """Those whose saved tensors have been seen."""
        self._deferred: set[tuple[int, Hashable]] = set()
        self._step = _Step((), True)
        self._lives = Lives(ledger, self._sizes, last)

    def begin(self, signatures: Sequence[Hashable], recomputed: frozenset[int], *, training: bool) -> None:
        self._step = _Step(signatures, training)
        self._lives.recomputed = recomputed

    def forget(self) -> None:
        """Measure anew."""
        self.measured.clear()
        self._complete.clear()
        self._deferred.clear()

    def end(self) -> None:
        """Every transfer is over."""
        self._ledger.set("transfers", 0)
        if not self._step.training:
            self._lives.end_evaluation()

    def _sizes(self, unit: int, mb: int) -> UnitBytes:
        return self.measured[unit, self._step.signatures[mb]]

    def watch(self, unit: Any, mb: int, given: Any, run: Run, again: bool = False) -> tuple[Boundary, Pass]:
        """What ``run()`` gives, a forward with a graph of an ``executor.UnitRun``.

        given: a pytree of what the unit is called with; again: it is a recomputation.
        """
        key = (unit.index, self._step.signatures[mb])
        made = run() if key in self._complete else self._measure(key, unit, given, run)
        if again:
            self._lives.recompute(unit.index, mb)
        else:
            self._lives.forward(unit.index, mb)
        return made

    def _measure(self, key: tuple[int, Hashable], unit: Any, given: Any, run: Run) -> tuple[Boundary, Pass]:
        counter = FlopCounterMode(display=False) if self._flops else None
        with saved_tensors() as saved, counter or nullcontext():
            made = run()
        self._complete.add(key)
        sizes = unit_bytes(unit.module, saved, pytree.tree_leaves(given), made[0])
        self.measured[key] = replace(sizes, flops=0 if counter is None else counter.get_total_flops())
        return made

    def largest(self) -> dict[str, list[int]]:
        """By unit, the largest bytes of any batch signature, as ``memory.largest`` takes them."""
        out: dict[str, list[int]] = {}
        for (unit, _), sizes in self.measured.items():
            row = list(astuple(sizes))
            out[str(unit)] = [max(pair) for pair in zip(row, out.get(str(unit), row), strict=True)]
        return out

    def forward(self, unit: Any, mb: int, out: Boundary) -> None:
        """After a forward without a graph."""
        key = (unit.index, self._step.signatures[mb])
        self._note("act", key, out.tensors())
        self._note("grad", key, out.carriers())
        self._lives.forward(unit.index, mb, training=self._step.training)

    def arrive(self, unit: int, mb: int, x: Boundary) -> None:
        """The output of a unit has come from another rank."""
        key = (unit, self._step.signatures[mb])
        self._note("act", key, x.tensors())
        self._note("grad", key, x.carriers())
        self._lives.receive("act", unit, mb)

    def expect(self, kind: str, unit: int, mb: int) -> None:
        """Room is made for the output of a unit (``act``) or its gradient (``grad``), if its size is known."""
        if (unit, self._step.signatures[mb]) in self.measured:
            self._lives.receive(kind, unit, mb)

    def _note(self, kind: str, key: tuple[int, Hashable], tensors: Sequence[torch.Tensor]) -> None:
        """Remember a size that no forward with a graph has told."""
        if key not in self._complete:
            nbytes = sum(storages(tensors).values())
            before = self.measured.get(key, UnitBytes())
            self.measured[key] = replace(before, output=nbytes) if kind == "act" else replace(before, carriers=nbytes)

    def backward(self, unit: Any, mb: int, deferring: bool) -> None:
        key = (unit.index, self._step.signatures[mb])
        if deferring and key not in self._deferred:
            self._deferred.add(key)
            writers = [w for _, w in unit.grads.pending.get(mb, ())]
            sizes = self.measured[key]
            graph = sizes.held + sizes.saved_output if unit.splitter.twice else 0
            self.measured[key] = replace(sizes, deferred=graph + closure_bytes(unit.module, writers))
        self._lives.backward(unit.index, mb, deferred=deferring)

    def weights(self, unit: int, mb: int) -> None:
        self._lives.weights(unit, mb)

    def send(self, kind: str, unit: int, mb: int) -> int:
        """Bytes that only the transfer holds from now on."""
        return self._lives.send(kind, unit, mb)

    def transferring(self, nbytes: int) -> None:
        """What is under way to other ranks and held by nobody else."""
        self._ledger.set("transfers", nbytes)
