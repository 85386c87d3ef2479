"""The run: a program with zero buffering over (main, lanes). It ends, or the waiting cycle is named.

Events are the start of every action on its rank's main lane and the completion of every *meeting*
(a transfer, or a collective of members on several ranks). Who meets whom is fixed by order, since
there are no wildcard receives; so the run is a graph of "waits for", the order in which events fire
cannot matter, and the program ends if and only if the graph has no cycle. Buffering only removes
waits.

The data- and tensor-parallel replicas of a pipeline coordinate run the same list. The graph of all
ranks maps onto the one built here, replica onto coordinate, so a cycle there would be a cycle here.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque

from ..actions import TRANSFER, Action, Subject, compute
from ..errors import ConfigError
from ..grid import Place
from ..lanes import Lane, Lanes, Post
from ..passes import consumed_by
from ..passes.resident import NEEDS_PARAMS
from .cycle import Part, Run, refuse_cycle
from .facts import Boundary, Facts
from .footprint import Footprint, Groups
from .refusal import at, refuse

POSTED = ("REDUCE", "UNSHARD")
"""State actions whose collectives go on the lane of their group; all others run on the main lane."""


def run(facts: Facts, lanes: Lanes, footprint: Footprint, groups: Groups, *, late: bool = False) -> tuple[Place, ...]:
    """The order in which the main lanes' actions can start; refuses a program that would block.

    late: a receive is posted when its tensor, or one that follows on its link, is used.
    """
    graph = Run(facts)
    posts = _uses(facts) if late else {}
    transfers = {boundary: graph.meet() for boundary in facts.sends}  # the rules proved that order matches them
    _wait_for_transfers(graph, transfers)
    collectives = _Collectives(graph, footprint, groups)
    for rank, row in enumerate(facts.program.ranks):
        tails: dict[Lane, int] = {}
        pending: dict[Subject, list[int]] = defaultdict(list)
        for step, action in sorted(enumerate(row), key=lambda one: posts.get((rank, one[0]), one[0])):
            place = (rank, step)
            if action.op in TRANSFER:
                meeting = transfers[action.subject, action.microbatch or 0]
                _post(graph, place, meeting, _transfer_lane(lanes, rank, action), tails, posts.get(place, step))
            else:
                _wait_for_posted(graph, pending, place, action)
            for name, meeting in collectives.issue(place, action):
                posted = action.op in POSTED
                _post(graph, place, meeting, lanes(Post(rank, action.op, group=name)) if posted else "main", tails)
                if posted:
                    pending[action.subject].append(meeting)
    collectives.close()
    return _fire(graph)


def _transfer_lane(lanes: Lanes, rank: int, action: Action) -> Lane:
    assert isinstance(action.peer, int)  # by facts.read
    return lanes(Post(rank, action.op, action.peer, "out" if action.op == "SEND" else "in"))


def _uses(facts: Facts) -> dict[Place, float]:
    """For each RECV, just before which step it is posted at the latest: a use of its tensor or of a later one."""
    by_link: dict[Place, list[tuple[int, int]]] = defaultdict(list)
    for (subject, m), (rank, step) in facts.recvs.items():
        maker = subject.index or 0
        user = facts.spans["F", maker + 1, m] if subject.kind == "act" else facts.backward(maker - 1, m)
        by_link[rank, facts.program.stages[maker]].append((step, user.first))
    out: dict[Place, float] = {}
    for (rank, _), recvs in by_link.items():
        first = math.inf
        for step, use in sorted(recvs, reverse=True):
            first = min(first, use)
            out[rank, step] = first - 0.5
    return out


def _post(
    graph: Run, place: Place, meeting: int, lane: Lane, tails: dict[Lane, int], when: float | None = None
) -> None:
    """The meeting takes place after the post, and after what is before it on the lane. when: the post's step, if it
    is another; between two steps, it comes before anything that the second waits for."""
    graph.parts(meeting).append(Part(place, lane))
    rank, step = place
    posted = math.floor(step if when is None else when)
    if posted >= 0:
        graph.wait(graph.start((rank, posted)), meeting)
    if lane == "own":
        return
    if lane == "main":
        if step + 1 < len(graph.facts.program.ranks[rank]):
            graph.wait(meeting, graph.start((rank, step + 1)))
        lane = ("main of one action", place)  # collectives of one action run one after the other
    if lane in tails:
        graph.wait(tails[lane], meeting)
    tails[lane] = meeting


def _wait_for_transfers(graph: Run, transfers: dict[Boundary, int]) -> None:
    """A compute starts once the boundary tensor it receives is there."""
    for (op, stage, microbatch), span in graph.facts.spans.items():
        if received := consumed_by(graph.facts.program, compute(op, stage, microbatch)):
            graph.wait(transfers[received, microbatch], graph.start((span.rank, span.first)))


def _wait_for_posted(graph: Run, pending: dict[Subject, list[int]], place: Place, action: Action) -> None:
    """CLIP waits for every REDUCE of the rank, STEP for its bucket's, RESHARD for what it ends, a compute for
    the parameters it uses."""
    if not pending:
        return
    layout, waits = graph.facts.layout, []
    if action.op == "CLIP":
        waits = [s for s in pending if s.kind == "grads"]
    elif action.op == "STEP":
        waits = [Subject("grads", action.subject.index)]
    elif action.op == "RESHARD":
        waits = [action.subject]
    elif action.op in NEEDS_PARAMS and layout is not None:
        waits = [Subject("params", b.index) for b in layout.touched(place[0], action)]
    for subject in waits:
        for meeting in pending.pop(subject, []):
            graph.wait(meeting, graph.start(place))


class _Collectives:
    """Pairs the k-th collective of each member of a group with the k-th of the others."""

    def __init__(self, graph: Run, footprint: Footprint, groups: Groups) -> None:
        self.graph, self.footprint = graph, footprint
        self.member_of: dict[tuple[str, int], tuple[int, ...]] = {}
        for name, lists in groups.items():
            for c, members in ((c, one) for one in lists for c in one):
                if self.member_of.setdefault((name, c), members) != members:
                    raise ConfigError(f"groups named {name!r} share coordinate {c}: {list(lists)} must be disjoint")
        self.groups = groups
        self.issued: dict[tuple[str, tuple[int, ...]], list[tuple[int, tuple[str, int], Place]]] = defaultdict(list)
        self.counts: dict[tuple[str, int], int] = defaultdict(int)

    def issue(self, place: Place, action: Action) -> list[tuple[str, int]]:
        """The meetings of an action's collectives, by group name."""
        out, program = [], self.graph.facts.program
        for name, op, size in self.footprint(place[0], action):
            members = self.member_of.get((name, place[0]))
            if members is None:
                known = ", ".join(f"{n}: {list(m)}" for n, m in self.groups.items())
                why = f"{at(program, place)} uses group {name!r}, which rank {place[0]} is not in ({known})"
                refuse(program, why, [place])
            if len(members) == 1 and action.op not in POSTED:
                continue  # inside the coordinate and on the main lane: all replicas are here
            line = self.issued[name, members]
            k = self.counts[name, place[0]]
            self.counts[name, place[0]] += 1
            if k == len(line):
                line.append((self.graph.meet(), (op, size), place))
            meeting, what, first = line[k]
            if what != (op, size):
                theirs = f"{what[0]} of {what[1]} bytes by {at(program, first)}"
                ours = f"{op} of {size} bytes by {at(program, place)}"
                refuse(program, f"operation {k} of group {name!r} is {theirs}, but {ours}", [first, place])
            out.append((name, meeting))
        return out

    def close(self) -> None:
        """Every member has issued as many collectives as the others."""
        program = self.graph.facts.program
        for (name, members), line in self.issued.items():
            for rank in members:
                if (k := self.counts[name, rank]) < len(line):
                    where = line[k][2]
                    what = f"operation {k} of group {name!r}, {line[k][1][0]} by {at(program, where)}"
                    refuse(program, f"{what}, never meets rank {rank}", [where])


def _fire(graph: Run) -> tuple[Place, ...]:
    waits = [0] * len(graph.follows)
    for followers in graph.follows:
        for e in followers:
            waits[e] += 1
    ready = deque(e for e, n in enumerate(waits) if not n)
    fired: list[int] = []
    while ready:
        fired.append(event := ready.popleft())
        for e in graph.follows[event]:
            waits[e] -= 1
            if not waits[e]:
                ready.append(e)
    if len(fired) < len(graph.follows):
        refuse_cycle(graph, {e for e, n in enumerate(waits) if n})
    return tuple(graph.places[e] for e in fired if graph.is_start(e))
