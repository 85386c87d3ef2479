"""Runs one rank's list of actions: one handler per kind of action, and nothing that decides.

What a handler needs beyond its action lives in ``StepState`` (this step) or in the parts it is
built from (units, wire, sharded state). The order of the list is the only control flow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..actions import Action, stage_of
from ..errors import TriloomError
from ..memory import Ledger
from ..scope import Scope
from ..verify import Held
from . import cut
from .activations import Activations
from .cut import Boundary, Pass
from .step_state import Handler, Recorder, StepState, UnitRun
from .wire import TensorMeta, TreeMeta, Wire, encode, fill, meta_of

__all__ = ["Executor", "Handler", "Recorder", "StepState", "UnitRun"]


class Executor:
    """Executes actions of the stages this rank holds.

    stages: the units of every stage of the model, as global unit numbers; where: the pipeline
    coordinate of every stage; here: this rank's coordinate; handlers: of the actions on sharded state; ready:
    waits for the parameters of a unit; ledger: is told of all bytes that computes hold; flops:
    of the forwards are counted. headers: shapes between stages depend on more than the shapes of the batch, so that
    every activation travels behind a header, and sizes are measured anew in each step.
    """

    def __init__(
        self,
        *,
        stages: Sequence[range],
        where: Sequence[int],
        here: int,
        units: dict[int, UnitRun],
        wire: Wire,
        scope: Scope,
        handlers: dict[str, Handler],
        ready: Callable[[int], None],
        record: Recorder | None = None,
        ledger: Ledger | None = None,
        flops: bool = False,
        headers: bool = False,
    ) -> None:
        self._stages = stages
        self._where = where
        self._here = here
        self._units = units
        self._stage_of_unit = {u: s for s, run in enumerate(stages) for u in run}
        self._wire = wire
        self._scope = scope
        self._ready = ready
        self._record = record
        self._metas: dict[tuple[int, Any], TreeMeta] = {}
        self._seen: set[Any] = set()
        self._headers = headers
        self._apart: tuple[Sequence[Action], frozenset[int]] = ((), frozenset())
        """The units with a W of the list that ran last."""
        self.activations = Activations(ledger or Ledger(), stages[-1][-1], flops=flops)
        self._handlers: dict[str, Handler] = {
            "F": self._forward,
            "BW": self._backward_now,
            "B": self._backward_deferred,
            "W": self._weights,
            "R": self._recompute,
            "SEND": self._send,
            "RECV": self._recv,
            **handlers,
        }

    def run(self, actions: Sequence[Action], state: StepState) -> None:
        """Execute a verified list. Returns with every transfer done."""
        with torch.enable_grad():  # once, and not around each of its calls
            self._run(actions, state)

    def _run(self, actions: Sequence[Action], state: StepState) -> None:
        if self._headers:
            self._forget(state)
        state.unknown = frozenset(state.signatures) - self._seen
        if self._apart[0] is not actions:
            self._apart = actions, frozenset(u for a in actions if a.op == "W" for u in self._subject_units(a))
        state.apart = self._apart[1]
        self.activations.begin(state.signatures, state.recomputed, training=state.training)
        if self._record is None:
            for action in actions:
                self._handlers[action.op](action, state)
        else:
            self._record.begin(len(actions))
            for action in actions:
                begin = time.perf_counter_ns()
                self._handlers[action.op](action, state)
                self._record.action(action, begin, time.perf_counter_ns())
        self._wire.drain()
        self.activations.end()
        self._seen |= state.unknown

    def _forget(self, state: StepState) -> None:
        """Nothing is known of a microbatch from another one."""
        state.signatures = list(enumerate(state.signatures))
        self._metas.clear()
        self._seen.clear()
        self.activations.forget()

    def held(self, state: StepState) -> frozenset[Held]:
        """What is held for microbatches now; ``verify.held`` says it beforehand."""
        saved = (*state.passes, *state.kept)
        tables = (("act", state.outs), ("grad", state.grads), ("saved", saved))
        out = {(kind, u, mb) for kind, keys in tables for u, mb in keys}
        out |= {("deferred", u, mb) for u, unit in self._units.items() for mb in unit.grads.pending}
        for kind, stage, mb in self._wire.expected():
            out.add((kind, self._stages[stage][-1] if kind == "act" else self._stages[stage][0] - 1, mb))
        return frozenset(out)

    def unsplit(self) -> dict[int, list[str]]:
        """Units with a W of their own in which nothing can wait for it, and their parameters; known after a step."""
        return {
            u: [name for name, p in unit.module.named_parameters() if any(p is r for r in unit.splitter.rest)]
            for u, unit in self._units.items()
            if unit.splitter.nothing
        }

    # -- forward ---------------------------------------------------------------------------------

    def _forward(self, action: Action, state: StepState) -> None:
        mb = _mb(action)
        for u in self._subject_units(action):
            self._forward_unit(u, mb, state)

    def _forward_unit(self, u: int, mb: int, state: StepState) -> None:
        stage = self._stage_of_unit[u]
        first = u == self._stages[stage][0]
        x = self._stage_input(stage, mb, state) if first else state.outs.pop((u - 1, mb))
        unit = self._units[u]
        out = self._run_unit(unit, x, mb, state)
        if unit.is_loss:
            self._loss(unit, out, mb, state)
            return
        state.outs[u, mb] = out
        if u == self._stages[stage][-1]:
            state.carriers[stage, mb] = [(tuple(t.shape), t.dtype) for t in out.carriers()]

    def _stage_input(self, stage: int, mb: int, state: StepState) -> Boundary:
        if stage == 0:
            return state.inputs[mb]
        peer = self._where[stage - 1]
        if peer == self._here:
            return state.outs.pop((self._stages[stage - 1][-1], mb))
        tensors = self._wire.take(("act", stage - 1, mb), peer)
        x = fill(self._metas[stage - 1, state.signatures[mb]], tensors)
        self.activations.arrive(self._stages[stage - 1][-1], mb, x)
        return x

    def _enter(self, unit: UnitRun, mb: int, state: StepState) -> tuple[Any, ...]:
        """Set the scope for a forward of the unit; returns its further arguments."""
        self._ready(unit.index)
        scope = self._scope
        scope.step, scope.unit, scope.microbatch = state.step, unit.index, mb
        scope.sample0, scope.grads = state.samples[mb], unit.grads
        return (state.targets[mb],) if unit.is_loss else ()

    def _run_unit(self, unit: UnitRun, x: Boundary, mb: int, state: StepState) -> Boundary:
        extra = self._enter(unit, mb, state)
        if not state.training:
            out = cut.forward_only(unit.module, x, *extra)
            self.activations.forward(unit, mb, out)
            return out
        if unit.index in state.recomputed:
            out, state.kept[unit.index, mb] = unit.keeper.forward(unit.module, x, bool(unit.params), *extra)
            self.activations.forward(unit, mb, out)
            return out
        inside = self._redirecting(unit, state)
        out, record = self.activations.watch(
            unit, mb, (x.leaves, extra), lambda: unit.keeper.run(unit.module, x, *extra, inside=inside)
        )
        self._remember(unit, mb, record, state)
        return out

    def _redirecting(self, unit: UnitRun, state: StepState) -> AbstractContextManager[Any] | None:
        """What is around a forward with a graph of a unit whose W may be apart from its B."""
        apart = unit.index in state.apart and unit.params
        return unit.splitter.redirecting(unit.module, unit.params, unit.grads) if apart else None

    def _remember(self, unit: UnitRun, mb: int, record: Pass, state: StepState) -> None:
        state.passes[unit.index, mb] = record
        unit.splitter.settle(record.outputs)

    def _recompute(self, action: Action, state: StepState) -> None:
        mb = _mb(action)
        for u in self._subject_units(action):
            if u in state.recomputed:
                self._recompute_unit(self._units[u], mb, state)

    def _recompute_unit(self, unit: UnitRun, mb: int, state: StepState) -> None:
        extra = self._enter(unit, mb, state)
        kept, inside = state.kept.pop((unit.index, mb)), self._redirecting(unit, state)
        again, given = unit.keeper.again, (kept.x.leaves, extra)
        _, record = self.activations.watch(
            unit, mb, given, lambda: again(unit.module, kept, *extra, inside=inside), again=True
        )
        self._remember(unit, mb, record, state)

    def _loss(self, unit: UnitRun, out: Boundary, mb: int, state: StepState) -> None:
        state.losses[mb] = out.leaves[0]
        if state.training:
            seed = torch.full_like(out.leaves[0], state.loss_scale)
            grads = [seed if i == 0 else torch.zeros_like(y) for i, y in enumerate(out.carriers())]
            state.grads[unit.index, mb] = grads if out.needs_grad[0] else []

    # -- backward --------------------------------------------------------------------------------

    def _backward_now(self, action: Action, state: StepState) -> None:
        self._backward(action, state, deferring=None)

    def _backward_deferred(self, action: Action, state: StepState) -> None:
        self._backward(action, state, deferring=_mb(action))

    def _backward(self, action: Action, state: StepState, deferring: int | None) -> None:
        mb = _mb(action)
        for u in reversed(self._subject_units(action)):
            unit = self._units[u]
            stage = self._stage_of_unit[u]
            if u == self._stages[stage][-1] and stage + 1 < len(self._stages):
                state.grads[u, mb] = self._stage_grads(stage, mb, state)
            self._ready(u)
            unit.grads.deferring = deferring
            found = _gradients(unit, state.passes.pop((u, mb)), state.grads.pop((u, mb)))
            self.activations.backward(unit, mb, deferring is not None)
            if u > 0:
                state.grads[u - 1, mb] = found

    def _stage_grads(self, stage: int, mb: int, state: StepState) -> list[torch.Tensor]:
        """Gradients of a stage's outputs, from the stage after it."""
        peer = self._where[stage + 1]
        if peer == self._here:
            return state.grads.pop((self._stages[stage][-1], mb))
        grads = self._wire.take(("grad", stage + 1, mb), peer)
        del state.carriers[stage, mb]
        return grads

    def _weights(self, action: Action, state: StepState) -> None:
        for u in reversed(self._subject_units(action)):
            self._units[u].grads.flush(_mb(action))
            self.activations.weights(u, _mb(action))

    def _subject_units(self, action: Action) -> range:
        index = action.subject.index or 0
        return self._stages[index] if action.subject.kind == "stage" else range(index, index + 1)

    # -- transfers -------------------------------------------------------------------------------

    def _send(self, action: Action, state: StepState) -> None:
        kind, stage = action.subject.kind, stage_of(action)
        mb, peer = _mb(action), _peer(action)
        if kind == "grad":
            before = self._stages[stage][0] - 1
            self._wire.send(state.grads.pop((before, mb)), peer, self.activations.send("grad", before, mb))
            self.activations.transferring(self._wire.held)
            return
        x = state.outs.pop((self._stages[stage][-1], mb))
        meta = meta_of(x)
        signature = state.signatures[mb]
        if signature in state.unknown:
            self._wire.send([encode(meta)], peer)
            self._metas[stage, signature] = meta
        elif self._metas[stage, signature] != meta:
            raise TriloomError(
                f"stage {stage} gave another shape for microbatch {mb} than before with the same batch shapes: "
                f"{self._metas[stage, signature].leaves} then, {meta.leaves} now; give Engine(shapes='data') if shapes "
                "between stages depend on more than the shapes of the batch"
            )
        self._wire.send(x.tensors(), peer, self.activations.send("act", self._stages[stage][-1], mb))
        self.activations.transferring(self._wire.held)

    def _recv(self, action: Action, state: StepState) -> None:
        kind, stage = action.subject.kind, stage_of(action)
        mb, peer = _mb(action), _peer(action)
        if kind == "grad":
            self._expect_grad(stage, mb, peer, state)
            return
        signature = state.signatures[mb]

        def from_header() -> list[TensorMeta]:
            meta = self._wire.receive_header(peer)
            self._metas[stage, signature] = meta
            return meta.tensors()

        known = None if signature in state.unknown else self._metas[stage, signature].tensors()
        self.activations.expect("act", self._stages[stage][-1], mb)
        self._wire.expect(("act", stage, mb), peer, known, from_header)

    def _expect_grad(self, stage: int, mb: int, peer: int, state: StepState) -> None:
        key = (stage - 1, mb)
        self.activations.expect("grad", self._stages[stage - 1][-1], mb)
        self._wire.expect(("grad", stage, mb), peer, state.carriers.get(key), lambda: state.carriers[key])


def _gradients(unit: UnitRun, record: Pass, grads: list[torch.Tensor]) -> list[torch.Tensor]:
    """Of the unit's inputs; weight gradients are in the unit's sink, or wait in it for W."""
    again = unit.splitter.twice and not unit.grads.immediate
    found = cut.backward(record, grads, [] if again else unit.params, unit.grads, again)
    if again:
        unit.splitter.keep_graph(record.outputs, grads)
    unit.splitter.hand_over(unit.grads)
    return found


def _mb(action: Action) -> int:
    if action.microbatch is None:
        raise TriloomError(f"action {action} needs a microbatch")
    return action.microbatch


def _peer(action: Action) -> int:
    if not isinstance(action.peer, int):
        raise TriloomError(f"action {action} needs the pipeline coordinate of its peer")
    return action.peer
