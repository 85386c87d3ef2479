"""STEP of a bucket: its rules on what is kept, widened before and rounded after where it is kept in fewer bits, and
gathered over tp where a rule wants whole tensors of which a rank has a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .. import philox
from ..groups.base import Group
from ..native import Pool
from ..optim import Hyper
from ..rounding import round_piece_
from ..shards import ShardSpec
from .bucket import BucketState
from .executor import StepState
from .gather import TpParts
from .precision import COMPENSATION
from .segments import EACH, Call

CHUNK = 1 << 16
"""Elements of a flat piece that a host widens at a time: the copies stay in its cache."""
DEVICE_CHUNK = 1 << 24
"""The same of another device: kernels that pay off, and copies of 64 MiB each."""


class Updates:
    """Runs the rules of one rank. specs: of all parameters, by name; seed: of the draws that round by chance."""

    def __init__(self, tp: Group, specs: Mapping[str, ShardSpec], *, seed: int, pool: Pool | None) -> None:
        self._tp, self._specs, self._seed, self._pool = tp, specs, seed, pool
        self._parts: dict[str, TpParts] = {}

    def __call__(self, state: BucketState, call: Call, step: StepState) -> None:
        """One call of a rule. Collective over tp for a whole tensor that is split there."""
        hyper = Hyper(
            lr=call.treatment.rate(step.step),
            step=step.step + 1 - call.missed,
            weight_decay=call.treatment.weight_decay,
            grad_scale=step.grad_scale,
            pool=self._pool,
        )
        split = self._split(call)
        if split is None and state.precision.direct:
            low, span = state.low, call.span
            call.treatment.rule.update(
                state.master[span].view(call.shape),
                state.final_grads[span].view(call.shape),
                call.states,
                hyper,
                None if low is None else low[span].view(call.shape),
            )
        else:
            for piece in _pieces(state, call):
                self._widened(state, call, piece, hyper, step.step, split)
        for one, others in call.copies:
            others.copy_(one)

    def _split(self, call: Call) -> TpParts | None:
        """How the parameter of a rule on whole tensors is split over tp; None if it is not, or does not matter."""
        name = call.parts[0].name
        spec = self._specs[name]
        if call.treatment.rule.reach is not None or spec.dim is None or self._tp.size == 1:
            return None
        if name not in self._parts:
            self._parts[name] = TpParts(spec, self._tp)
        return self._parts[name]

    @torch.no_grad()
    def _widened(
        self, state: BucketState, call: Call, piece: _Piece, hyper: Hyper, step: int, split: TpParts | None
    ) -> None:
        how = state.precision
        for name, value in piece.numbers.items():
            call.states[name].copy_(value)
        kept = {name: t for name, t in piece.states.items() if name != COMPENSATION}
        param = piece.param.to(how.work)
        if how.compensated:
            param = param + piece.states[COMPENSATION]
        states = {n: t.to(how.work) if t.dtype == how.states else t for n, t in kept.items()}
        grad, mine = piece.grad, param
        if split is not None:
            param, grad = split.whole(param), split.whole(grad)
            states = {n: split.whole(t) if t.shape == mine.shape else t for n, t in states.items()}
        call.treatment.rule.update(param, grad, states, hyper, None)
        if split is not None:
            param = split.mine(param)
            states = {n: split.mine(t) if kept[n].shape == mine.shape else t for n, t in states.items()}
        for name, t in kept.items():
            if t.data_ptr() != states[name].data_ptr():
                self._keep(t, states[name], call, piece, name, step)
        self._keep_param(state, call, piece, param, step)

    def _keep_param(self, state: BucketState, call: Call, piece: _Piece, param: torch.Tensor, step: int) -> None:
        how, low = state.precision, state.low
        if how.compensated:
            piece.param.copy_(param)
            piece.states[COMPENSATION].copy_(param - piece.param)
        elif piece.param.data_ptr() != param.data_ptr():
            self._keep(piece.param, param, call, piece, "param", step)
        if low is not None:
            low[piece.span].view(param.shape).copy_(param)

    def _keep(self, out: torch.Tensor, values: torch.Tensor, call: Call, piece: _Piece, what: str, step: int) -> None:
        """Values as they are kept: rounded by chance if in fewer bits."""
        if out.dtype == values.dtype:
            out.copy_(values)
            return
        for p in piece.parts:
            key = philox.key(self._seed, "round", what, p.name, step)
            if out.shape != piece.param.shape:  # all ranks of tp have it whole
                round_piece_(out.view(-1), values.reshape(-1), key, ShardSpec(tuple(out.shape)), 0, pool=self._pool)
                continue
            inside = slice(p.start, p.stop)
            round_piece_(
                out.view(-1)[inside], values.reshape(-1)[inside], key, self._specs[p.name], p.first, pool=self._pool
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """A parameter's elements in a piece: ``start`` to ``stop``, of which the first is its ``first``."""

    name: str
    start: int
    stop: int
    first: int


@dataclass(frozen=True, slots=True)
class _Piece:
    """What is widened at a time. All views of what is kept."""

    span: slice
    param: torch.Tensor
    grad: torch.Tensor
    states: Mapping[str, torch.Tensor]
    numbers: Mapping[str, torch.Tensor]
    """What single numbers of the call were before its first piece."""
    parts: Sequence[_Place]


def _pieces(state: BucketState, call: Call) -> Iterator[_Piece]:
    n, start = call.span.stop - call.span.start, call.span.start
    whole = call.treatment.rule.reach is None
    numbers = {name: t.clone() for name, t in call.states.items() if call.per[name] == EACH}
    size = n if whole else CHUNK if state.master.device.type == "cpu" else DEVICE_CHUNK
    for lo in range(0, n, size):
        hi = min(n, lo + size)
        span = slice(start + lo, start + hi)
        shape = call.shape if whole else (hi - lo,)
        states = {
            name: t if whole or call.per[name] == EACH else t[lo // call.per[name] : hi // call.per[name]]
            for name, t in call.states.items()
        }
        yield _Piece(
            span,
            state.master[span].view(shape),
            state.final_grads[span].view(shape),
            states,
            numbers,
            _places(state, call, lo, hi),
        )


def _places(state: BucketState, call: Call, lo: int, hi: int) -> list[_Place]:
    """The parameters in elements ``lo`` to ``hi`` of a call, padding left out: that stays zero."""
    at = state.updates.start + call.span.start
    out = []
    for part in call.parts:
        slot = state.slots[part.name]
        a, b = max(part.start, lo, slot.offset - at), min(part.stop, hi, slot.stop - at)
        if a < b:
            out.append(_Place(part.name, a - lo, b - lo, at + a - slot.offset))
    return out
