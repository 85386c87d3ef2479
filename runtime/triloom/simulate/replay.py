"""The replay: every rank runs its list in order, an action starts when what it needs is there. Pure.

A rank runs on until it needs something nobody has made yet, and is taken up again by whoever makes
it. Every action is looked at once, so the cost is linear in their number, however many ranks there are.
"""

from __future__ import annotations

from ..actions import Program
from ..errors import ProgramError
from ..grid import grid
from ..passes import StateLayout, add_communication
from .costs import Costs
from .lower import BARRIER, GATED, POST, RECV, SEND, WORK, Lowering, Task
from .memory import peaks
from .timeline import Span, Timeline

UNKNOWN = -1.0


def simulate(program: Program, costs: Costs | None = None, *, layout: StateLayout | None = None) -> Timeline:
    """Times of a program; transfers are implied if it has none (those with a cost to the rank are added).

    layout: needed for programs with unit actions. Raises ProgramError with the grid if the program
    cannot run to its end, and ConfigError if the costs do not fit its stages.
    """
    costs = costs or Costs()
    explicit = any(a.op == "SEND" for row in program.ranks for a in row)
    if not explicit and (costs.blocking or costs.rendezvous or costs.overhead):
        program, explicit = add_communication(program), True
    lowering = Lowering(program, costs, layout, explicit)
    rows = lowering.rows()
    replay = _Replay(program, costs, rows, lowering.tensors)
    replay.run()
    return replay.timeline(peaks(program, costs, layout))


class _Replay:
    """State of a replay; lists over ranks, and over the numbers of tensors that ``lower`` gave."""

    def __init__(self, program: Program, costs: Costs, rows: list[list[Task]], tensors: int) -> None:
        self.program, self.costs, self.rows = program, costs, rows
        size = len(rows)
        self.step, self.clock = [0] * size, [0.0] * size
        self.begins: list[list[float]] = [[] for _ in rows]
        self.ends: list[list[float]] = [[] for _ in rows]
        self.lanes: list[list[Span]] = [[] for _ in rows]
        self.runnable = list(range(size - 1, -1, -1))
        self.ready, self.waiting = [UNKNOWN] * tensors, [-1] * tensors
        self.senders: dict[int, int] = {}
        """Rank that waits for the end of its own transfer, by tensor."""
        self.sent: dict[int, tuple[float, int, int]] = {}
        """When, by whom and in which step a tensor was sent."""
        self.expected: dict[int, float] = {}
        self.links: dict[int, float] = {}
        self.collectives = [0.0] * size
        self.met: list[int] = []
        self.meeting = sum(any(task.kind == BARRIER for task in row) for row in rows)

    def run(self) -> None:
        while self.runnable:
            self._advance(self.runnable.pop())
        stuck = [(r, i) for r, i in enumerate(self.step) if i < len(self.rows[r])]
        if stuck:
            names = ", ".join(f"rank {r} before step {i} {self.program.ranks[r][i]}" for r, i in stuck)
            raise ProgramError(f"{self.program.name} cannot run to its end: {names}\n{grid(self.program, stuck)}")

    def _advance(self, rank: int) -> None:
        """Run a rank until it has to wait or is done."""
        row, i, t = self.rows[rank], self.step[rank], self.clock[rank]
        ready, waiting, runnable = self.ready, self.waiting, self.runnable
        begins, ends = self.begins[rank], self.ends[rank]
        while i < len(row):
            kind, need, seconds, made, latency, occupied, link, gate = task = row[i]
            if kind > GATED:
                self.clock[rank], self.step[rank] = t, i
                if not self._other(rank, task):
                    return
                t = self.clock[rank]
                i += 1
                continue
            if need >= 0:
                there = ready[need]
                if there < 0.0:
                    waiting[need] = rank
                    break
                if there > t:
                    t = there
            if gate >= 0 and ready[gate] > t:
                t = ready[gate]
            begins.append(t)
            t += seconds
            ends.append(t)
            if made >= 0:
                gone = t
                if occupied:
                    gone = self.links[link] = max(t, self.links.get(link, 0.0)) + occupied
                ready[made] = gone + latency
                if waiting[made] >= 0:
                    runnable.append(waiting[made])
                    waiting[made] = -1
            i += 1
        self.clock[rank], self.step[rank] = t, i

    # -- transfers and state -------------------------------------------------------------------------

    def _other(self, rank: int, task: Task) -> bool:
        """Run what is not plain work; False if the rank has to wait in it."""
        if task.kind == SEND:
            return self._send(rank, task)
        if task.kind == BARRIER:
            return self._meet(rank, task)
        if task.kind == POST:
            self._post(rank, task)
        elif task.kind == RECV:
            t = self._spend(rank, task.seconds)
            self.expected[task.made] = t
            if self.costs.rendezvous and task.made in self.sent:
                self._deliver(task, max(t, self.sent[task.made][0]))
        return True

    def _spend(self, rank: int, seconds: float) -> float:
        t = self.clock[rank]
        self.begins[rank].append(t)
        self.ends[rank].append(t + seconds)
        self.clock[rank] = t + seconds
        return t + seconds

    def _send(self, rank: int, task: Task) -> bool:
        key = task.made
        if key not in self.sent:
            t = self._spend(rank, task.seconds)
            self.sent[key] = (t, rank, self.step[rank])
            if not self.costs.rendezvous:
                self._deliver(task, t)
            elif key in self.expected:
                self._deliver(task, max(t, self.expected[key]))
        if self.costs.blocking:
            if self.ready[key] < 0.0:
                self.senders[key] = rank
                return False
            self.clock[rank] = self.ends[rank][-1] = self.ready[key]
        return True

    def _deliver(self, task: Task, t: float) -> None:
        """A transfer that can begin at ``t``, after those before it on its link."""
        key, (_, source, step) = task.made, self.sent[task.made]
        begin = max(t, self.links.get(task.link, 0.0)) if task.occupied else t
        self.links[task.link] = begin + task.occupied
        self.ready[key] = end = begin + task.occupied + task.latency
        self.lanes[source].append(Span(self.program.ranks[source][step], begin, end))
        if self.waiting[key] >= 0:
            self.runnable.append(self.waiting[key])
            self.waiting[key] = -1
        if key in self.senders:
            self.runnable.append(self.senders.pop(key))

    def _post(self, rank: int, task: Task) -> None:
        """A collective on its lane: after the ones before it."""
        begin = max(self._spend(rank, 0.0), self.collectives[rank])
        end = self.collectives[rank] = begin + task.seconds
        self.lanes[rank].append(Span(self.program.ranks[rank][self.step[rank]], begin, end))
        self.ready[task.made] = end

    def _meet(self, rank: int, task: Task) -> bool:
        """CLIP: every rank waits for its own reductions, then for all other ranks."""
        self.clock[rank] = max(self.clock[rank], self.collectives[rank])
        self.met.append(rank)
        if len(self.met) < self.meeting:
            return False
        self.clock[rank] = latest = max(self.clock[r] for r in self.met)
        for r in self.met:
            self.clock[r] = latest
            self._spend(r, task.seconds)
            if r != rank:
                self.step[r] += 1
                self.runnable.append(r)
        return True

    # -- result --------------------------------------------------------------------------------------

    def timeline(self, peak: tuple[float, ...]) -> Timeline:
        ranks = tuple(
            tuple(map(Span, row, begins, ends))
            for row, begins, ends in zip(self.program.ranks, self.begins, self.ends, strict=True)
        )
        busy = tuple(sum(task.seconds for task in row if task.kind in (WORK, GATED, BARRIER)) for row in self.rows)
        end = tuple(
            max([clock, lane, *(s.end for s in sent[-1:])])
            for clock, lane, sent in zip(self.clock, self.collectives, self.lanes, strict=True)
        )
        return Timeline(self.program, ranks, tuple(map(tuple, self.lanes)), busy, peak, end)
