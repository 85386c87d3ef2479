"""Bytes by class, present and at the peak: the ledger, what a microbatch holds, and the peak of a program. Pure.

One set of rules (:class:`Lives`) says what an action takes and gives back. The executor drives it with what it
measured, :func:`walk` with what was traced or assumed, so an estimate differs from a run by its sizes only.

What counts is storage that outlives an action: state, saved tensors, tensors between units, gradients of those,
what waits for W, what is under way to another rank. What an action allocates and frees inside itself does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from .actions import COMPUTE, Action, Subject
from .passes import StateLayout

CLASSES: Mapping[str, str] = {
    "params": "parameters, or this rank's shard of them",
    "grads": "gradients, or this rank's shard of them",
    "master": "parameters in accumulation precision, or what is kept of them besides bfloat16",
    "moments": "state of the optimizer",
    "padding": "alignment of all of these",
    "fixed": "frozen parameters and buffers",
    "ties": "accumulators of the further uses of tied parameters",
    "feedback": "what a compressed reduction keeps from step to step",
    "staging": "copies that a compressed reduction sends and receives",
    "gathered": "sharded parameters while they are whole",
    "grad_buckets": "sharded gradients while they are whole",
    "batch": "inputs and targets of the step",
    "activations": "saved tensors, tensors between units, inputs kept for recomputation",
    "act_grads": "gradients of tensors between units",
    "deferred": "what backwards leave for W",
    "transfers": "what is under way to another rank and held by nobody else",
}
"""Every class of memory, in the order in which they are shown."""

STATE = ("params", "grads", "master", "moments")
"""Model states, as the ZeRO paper counts them (arXiv 1910.02054, section 3.1)."""


class Ledger:
    """Present and peak bytes by class, and of all classes together."""

    def __init__(self) -> None:
        self._live = dict.fromkeys(CLASSES, 0)
        self._peak = dict.fromkeys(CLASSES, 0)
        self._total = self._total_peak = 0

    def add(self, kind: str, nbytes: int) -> None:
        """Take (or with a negative number give back) bytes of a class."""
        live = self._live[kind] = self._live[kind] + nbytes
        self._total += nbytes
        if nbytes > 0:
            self._peak[kind] = max(self._peak[kind], live)
            self._total_peak = max(self._total_peak, self._total)

    def set(self, kind: str, nbytes: int) -> None:
        self.add(kind, nbytes - self._live[kind])

    def report(self) -> Report:
        return Report(dict(self._live), dict(self._peak), self._total_peak)


@dataclass(frozen=True)
class Report:
    """Bytes of one rank."""

    present: dict[str, int]
    """By class, now."""
    peak: dict[str, int]
    """By class, each at its own highest."""
    total: int
    """Highest sum over the classes; at most the sum of their peaks."""

    @property
    def shown(self) -> dict[str, int]:
        """The peaks of the classes that were ever in use, and as ``total`` the highest sum."""
        return {kind: size for kind, size in self.peak.items() if size} | {"total": self.total}


@dataclass(frozen=True, kw_only=True)
class UnitBytes:
    """What one microbatch takes in one unit."""

    held: int = 0
    """Saved from F (or R) to the backward, input and output not counted."""
    output: int = 0
    """The tensors that go to the next unit."""
    saved_output: int = 0
    """Those of them that autograd saves too."""
    carriers: int = 0
    """Those of them that have a gradient."""
    deferred: int = 0
    """Kept from B to W, what is in ``held`` or the gradients not counted twice."""
    flops: int = 0
    """Of the forward: the cost of recomputing it."""
    input_flops: int = 0
    """Of the backward, without the weight gradients that can wait for W."""
    weight_flops: int = 0
    """Of those."""


def largest(of_ranks: Sequence[Mapping[str, Sequence[int]]]) -> dict[int, UnitBytes]:
    """By unit, the largest of what several ranks measured; each rank's by unit number as text, fields in order."""
    units = {u: [one[u] for one in of_ranks if u in one] for u in dict.fromkeys(u for one in of_ranks for u in one)}
    names = [f.name for f in fields(UnitBytes)]
    return {
        int(u): UnitBytes(**{name: max(r[i] for r in rows) for i, name in enumerate(names)})
        for u, rows in units.items()
    }


Sizes = Callable[[int, int], UnitBytes]
"""``sizes(unit, microbatch)``."""

_Key = tuple[str, int, int]
_CLASS = {"act": "activations", "grad": "act_grads"}


class Lives:
    """What each action holds and lets go of, on one rank.

    last: number of the loss unit, whose output is a number. recomputed: units that keep their input only.
    """

    def __init__(self, ledger: Ledger, sizes: Sizes, last: int, recomputed: frozenset[int] = frozenset()) -> None:
        self._ledger, self._sizes, self._last = ledger, sizes, last
        self.recomputed = recomputed
        self._uses: dict[_Key, tuple[int, int]] = {}
        """Tensors between units: how many hold it, and its bytes."""
        self._held: dict[tuple[int, int], int] = {}
        self._deferred: dict[tuple[int, int], int] = {}

    def _hold(self, kind: str, unit: int, mb: int) -> None:
        """One more user of the output of a unit (``act``) or of its gradient (``grad``)."""
        key = (kind, unit, mb)
        count, nbytes = self._uses.get(key) or (0, self._size(key))
        self._uses[key] = (count + 1, nbytes)
        if not count:
            self._ledger.add(_CLASS[kind], nbytes)

    def _drop(self, kind: str, unit: int, mb: int) -> bool:
        """One user less; whether it was the last."""
        key = (kind, unit, mb)
        if key not in self._uses:
            return False
        count, nbytes = self._uses.pop(key)
        if count > 1:
            self._uses[key] = (count - 1, nbytes)
            return False
        self._ledger.add(_CLASS[kind], -nbytes)
        return True

    def _size(self, key: _Key) -> int:
        kind, unit, mb = key
        sizes = self._sizes(unit, mb)
        return sizes.output if kind == "act" else sizes.carriers

    def _save(self, unit: int, mb: int, nbytes: int) -> None:
        self._held[unit, mb] = nbytes
        self._ledger.add("activations", nbytes)

    def receive(self, kind: str, unit: int, mb: int) -> None:
        """The output of a unit (``act``) or its gradient (``grad``) gets room, unless it has some."""
        if (kind, unit, mb) not in self._uses:
            self._hold(kind, unit, mb)

    def forward(self, unit: int, mb: int, *, training: bool = True) -> None:
        if unit > 0:
            self.receive("act", unit - 1, mb)
        if training and unit > 0:
            self._hold("act", unit - 1, mb)  # kept for the backward or for R
        if training and unit not in self.recomputed:
            sizes = self._sizes(unit, mb)
            self._save(unit, mb, sizes.held)
            if unit != self._last and sizes.saved_output:
                self._hold("act", unit, mb)
        if unit != self._last:
            self._hold("act", unit, mb)  # for its user
        if unit > 0:
            self._drop("act", unit - 1, mb)

    def recompute(self, unit: int, mb: int) -> None:
        if unit in self.recomputed:
            sizes = self._sizes(unit, mb)
            self._save(unit, mb, sizes.held + sizes.saved_output)

    def backward(self, unit: int, mb: int, *, deferred: bool = False) -> None:
        sizes = self._sizes(unit, mb)
        if unit != self._last:
            self.receive("grad", unit, mb)
        if unit > 0:
            self._hold("grad", unit - 1, mb)
        again = unit in self.recomputed
        self._ledger.add("activations", -self._held.pop((unit, mb), 0))
        if deferred:
            self._deferred[unit, mb] = sizes.deferred
            self._ledger.add("deferred", sizes.deferred)
        if unit > 0:
            self._drop("act", unit - 1, mb)
        if unit != self._last:
            self._drop("grad", unit, mb)
            if not again and sizes.saved_output:
                self._drop("act", unit, mb)

    def weights(self, unit: int, mb: int) -> None:
        self._ledger.add("deferred", -self._deferred.pop((unit, mb), 0))

    def send(self, kind: str, unit: int, mb: int) -> int:
        """The maker hands over what it sends; bytes that only the transfer holds now."""
        nbytes = self._uses.get((kind, unit, mb), (0, 0))[1]
        return nbytes if self._drop(kind, unit, mb) else 0

    def end_evaluation(self) -> None:
        """Forward-only: nothing outlives the run."""
        for kind, unit, mb in list(self._uses):
            while not self._drop(kind, unit, mb):
                pass


@dataclass(frozen=True)
class BucketBytes:
    """The two flat tensors of a bucket that come and go; 0 for one that is always there."""

    gathered: int = 0
    """Whole parameters, between UNSHARD and RESHARD."""
    grad_bucket: int = 0
    """Whole gradients, between UNSHARD and RESHARD."""
    staging: int = 0
    """Copies of a reduction, between REDUCE and RESHARD, or CLIP."""


@dataclass
class _Walk:
    """Handlers of the actions of one coordinate, by operation."""

    lives: Lives
    ledger: Ledger
    layout: StateLayout
    buckets: Sequence[BucketBytes]
    whole: set[Subject] = field(default_factory=set)
    staged: dict[int, int] = field(default_factory=dict)
    """Bytes of the reductions under way, by bucket."""

    def act(self, a: Action) -> None:
        if a.op in COMPUTE:
            units = self.layout.units_of(a)
            for unit in units if a.op == "F" else reversed(units):
                self._compute(a.op, unit, a.microbatch or 0)
        elif a.op in ("SEND", "RECV"):
            self._transfer(a)
        elif a.op in ("UNSHARD", "RESHARD"):
            self._move(a)
        elif a.op == "REDUCE":
            self._stage(a.subject.index or 0)
        elif a.op == "CLIP":
            for bucket in list(self.staged):
                self._unstage(bucket)

    def _stage(self, bucket: int) -> None:
        self.staged[bucket] = self.buckets[bucket].staging
        self.ledger.add("staging", self.staged[bucket])

    def _unstage(self, bucket: int) -> None:
        self.ledger.add("staging", -self.staged.pop(bucket, 0))

    def _compute(self, op: str, unit: int, mb: int) -> None:
        steps: Mapping[str, Callable[[int, int], None]] = {
            "F": self.lives.forward,
            "BW": self.lives.backward,
            "B": lambda u, m: self.lives.backward(u, m, deferred=True),
            "W": self.lives.weights,
            "R": self.lives.recompute,
        }
        steps[op](unit, mb)

    def _transfer(self, a: Action) -> None:
        stage, mb = a.subject.index or 0, a.microbatch or 0
        kind = a.subject.kind
        unit = self.layout.units[stage][-1] if kind == "act" else self.layout.units[stage][0] - 1
        if a.op == "RECV":
            self.lives.receive(kind, unit, mb)
        else:
            self.ledger.set("transfers", 0)  # the one before has left by now, if the peer keeps up
            self.ledger.add("transfers", self.lives.send(kind, unit, mb))

    def _move(self, a: Action) -> None:
        if a.op == "RESHARD" and a.subject.kind == "grads":
            self._unstage(a.subject.index or 0)
        bucket = self.buckets[a.subject.index or 0]
        name, nbytes = (
            ("gathered", bucket.gathered) if a.subject.kind == "params" else ("grad_buckets", bucket.grad_bucket)
        )
        if a.op == "UNSHARD" and a.subject not in self.whole:
            self.whole.add(a.subject)
            self.ledger.add(name, nbytes)
        elif a.op == "RESHARD" and a.subject in self.whole:
            self.whole.remove(a.subject)
            self.ledger.add(name, -nbytes)


def walk(
    row: Iterable[Action],
    layout: StateLayout,
    sizes: Sizes,
    *,
    state: Mapping[str, int],
    buckets: Sequence[BucketBytes],
    recomputed: frozenset[int] = frozenset(),
) -> Report:
    """Bytes of one pipeline coordinate over the actions of a step.

    state: by class, what is there all the time; buckets: of the coordinate, in order.
    """
    ledger = Ledger()
    for kind, nbytes in state.items():
        ledger.add(kind, nbytes)
    last = max(u for units in layout.units for u in units)
    steps = _Walk(Lives(ledger, sizes, last, recomputed), ledger, layout, buckets)
    for a in row:
        steps.act(a)
    return ledger.report()


def zero_bytes(
    *, params: bool, grads: bool, optimizer: bool, ranks: int, param: int, grad: int, master: int = 4, moments: int = 8
) -> float:
    """Model-state bytes a parameter, sharded or not over ``ranks`` (arXiv 1910.02054, section 3.1 and figure 1).

    param, grad, master (0 where the parameters are their own), moments: bytes an element.
    """
    over = {True: ranks, False: 1}
    return param / over[params] + grad / over[grads] + (master + moments) / over[optimizer]
