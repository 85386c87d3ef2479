"""Actions and programs: a training step as data.

A *program* is, for every pipeline coordinate, one plain list of actions. The tensor- and
data-parallel replicas of a pipeline coordinate run the same list. Four readers use it: verify,
simulate, draw, execute.

Semantics, the same for every reader:

- ``F BW B W R`` run on the rank's main lane, in program order. ``BW`` is a backward whose weight
  gradients are computed inside it, ``B`` leaves them to a later ``W``.
- ``SEND``/``RECV`` only *post* a transfer on a communication lane and return. A compute action that
  consumes a boundary tensor (F: the activation of the stage before, B/BW: the gradient from the
  stage after) first waits for its RECV. A SEND holds its tensor until the transfer is done.
- ``REDUCE`` and ``UNSHARD`` post on the lane of their group; ``CLIP``, ``STEP`` and the use of
  unsharded state wait for what they need.
- ``WEIGH`` sums the loss weights of the step over dp and waits.

Text form, reversible, no spaces or commas (so a rank's list is one CSV row)::

    F:stage2@5             forward of stage 2, microbatch 5
    BW:stage2@5            backward with weight gradients        B:... W:... R:... alike
    SEND:act2@5>3          send the output of stage 2 to pipeline coordinate 3
    RECV:act2@5<1          receive the output of stage 2 from coordinate 1
    SEND:grad3@5>1         send the gradient of the input of stage 3 to coordinate 1
    REDUCE:grads.0         bucket 0 of the state class grads
    UNSHARD:params.0  RESHARD:params.0  STEP:params.0  TIE:grads.0  CLIP:all  WEIGH:all
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .errors import ProgramError


class Subject(NamedTuple):
    """What an action is about.

    kind: ``stage`` or ``unit`` (index: its number), ``act`` (index: the stage that made the
    activation), ``grad`` (index: the stage whose input gradient it is), a state class such as
    ``params`` or ``grads`` (index: the bucket), or ``all`` (index None).
    """

    kind: str
    index: int | None = None  # type: ignore[assignment]  # hides tuple.index, which nothing here needs

    def __str__(self) -> str:
        if self.index is None:
            return self.kind
        dot = "" if self.kind in _TIGHT else "."
        return f"{self.kind}{dot}{self.index}"


_TIGHT = ("stage", "unit", "act", "grad")

COMPUTE = ("F", "BW", "B", "W", "R")
TRANSFER = ("SEND", "RECV")
STATE = ("WEIGH", "TIE", "REDUCE", "CLIP", "STEP", "UNSHARD", "RESHARD", "FETCH", "EVICT")
OPS = COMPUTE + TRANSFER + STATE


class Action(NamedTuple):
    """One entry of a program. peer: pipeline coordinate of a transfer, or the name of a tier."""

    op: str
    subject: Subject
    microbatch: int | None = None
    peer: int | str | None = None

    def __str__(self) -> str:
        mb = "" if self.microbatch is None else f"@{self.microbatch}"
        arrow = "<" if self.op in ("RECV", "FETCH") else ">"
        peer = "" if self.peer is None else f"{arrow}{self.peer}"
        return f"{self.op}:{self.subject}{mb}{peer}"


_TEXT = re.compile(r"([A-Z]+):([a-z_]+)\.?(\d+)?(?:@(\d+))?(?:[<>](\w+))?")


def parse_action(text: str) -> Action:
    """Inverse of ``str(action)``; raises ProgramError naming the text."""
    m = _TEXT.fullmatch(text.strip())
    if not m or m[1] not in OPS:
        raise ProgramError(f"{text!r} is not an action; examples: F:stage0@3  SEND:act0@3>1  REDUCE:grads.0")
    op, kind, index, mb, peer = m.groups()
    action = Action(
        op,
        Subject(kind, None if index is None else int(index)),
        None if mb is None else int(mb),
        None if peer is None else (int(peer) if peer.isdecimal() else peer),
    )
    if str(action) != text.strip():
        raise ProgramError(f"{text!r} is not in canonical form; did you mean {action}?")
    return action


@dataclass(frozen=True)
class Program:
    """One list of actions per pipeline coordinate.

    stages[s] is the pipeline coordinate that runs stage s (several stages may share one).
    """

    ranks: tuple[tuple[Action, ...], ...]
    stages: tuple[int, ...]
    microbatches: int
    name: str = "custom"

    def to_csv(self) -> str:
        """One row per pipeline coordinate; the header holds what the rows cannot."""
        head = f"# {self.name} microbatches={self.microbatches} stages={'/'.join(map(str, self.stages))}"
        return "\n".join([head, *(",".join(map(str, row)) for row in self.ranks)]) + "\n"


def parse_program(text: str) -> Program:
    """Inverse of :meth:`Program.to_csv`."""
    lines = text.splitlines()
    m = re.fullmatch(r"# (\S+) microbatches=(\d+) stages=(\d+(?:/\d+)*)", lines[0].strip()) if lines else None
    if not m:
        raise ProgramError("a program file starts with '# NAME microbatches=M stages=0/1/...'")
    rows = tuple(tuple(parse_action(t) for t in line.split(",") if t.strip()) for line in lines[1:])
    return Program(rows, tuple(int(s) for s in m[3].split("/")), int(m[2]), m[1])


def compute(op: str, stage: int, microbatch: int) -> Action:
    """``F``, ``BW``, ``B``, ``W`` or ``R`` of a stage: the only actions a schedule writes."""
    return Action(op, Subject("stage", stage), microbatch)


def stage_of(action: Action) -> int:
    """Stage of a compute action."""
    assert action.subject.index is not None
    return action.subject.index


def replace_ranks(program: Program, ranks: Iterable[Iterable[Action]], name: str | None = None) -> Program:
    return Program(tuple(tuple(r) for r in ranks), program.stages, program.microbatches, name or program.name)
