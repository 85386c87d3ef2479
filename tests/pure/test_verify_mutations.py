"""Valid programs, mutated: what is accepted runs on strict rendezvous, what is refused is wrong in the way it says."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mutations import mutated
from program_edits import interpret
from triloom import schedules
from triloom.actions import TRANSFER, Action, Program, Subject, replace_ranks
from triloom.errors import DeadlockError, ProgramError
from triloom.groups.threads import run_threads
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state, consumed_by
from triloom.placement import zero1
from triloom.verify import verify

CLASSES = {
    "deadlock": r"deadlock, ",
    "form": r"repeats step|runs on rank|belongs on rank|microbatches are|no two of|share rank|stages are|runs whole",
    "coverage": r"it needs (F|BW|B)\b",
    "order": r"comes before .* which it needs",
    "transfer": r"is missing on rank|which makes what it sends|which brings what it uses|nothing in the program makes",
    "link": r"is sent by .* but received by",
    "accumulation": r"not in order",
}
"""What a refusal says, by class."""


def refusal(program: Program) -> str | None:
    """The class of the refusal, None for a program that is accepted."""
    try:
        verify(program)
    except ProgramError as error:
        said = str(error).splitlines()[0]
        (found, *_) = [name for name, text in CLASSES.items() if re.search(text, said)] or [said]
        return found
    return None


# ---------------------------------------------------------------- an oracle that looks at one thing at a time


def form(program: Program) -> bool:
    """Something stands where it cannot, or twice."""
    last = len(program.stages) - 1
    for rank, row in enumerate(program.ranks):
        for a in row:
            s, other = a.subject.index, (a.subject.index or 0) + (1 if a.subject.kind == "act" else -1)
            if s is None or a.microbatch is None or not 0 <= a.microbatch < program.microbatches:
                return True
            if a.op not in TRANSFER:
                if not 0 <= s <= last or program.stages[s] != rank:
                    return True
            elif not (0 <= s <= last and 0 <= other <= last):
                return True
            else:
                ends = (program.stages[s], program.stages[other])
                if ends[0] == ends[1] or (rank, a.peer) != (ends if a.op == "SEND" else ends[::-1]):
                    return True
    return any(n > 1 for row in program.ranks for n in Counter(row).values())


def coverage(program: Program) -> bool:
    """Some stage does not compute each microbatch once, forward and backward."""
    have: dict[tuple[int | None, int | None], list[str]] = defaultdict(list)
    for row in program.ranks:
        for a in row:
            if a.op not in (*TRANSFER, "R"):
                have[a.subject.index, a.microbatch].append(a.op)
    wanted = [(s, m) for s in range(len(program.stages)) for m in range(program.microbatches)]
    forward_only = not any(op != "F" for ops in have.values() for op in ops)
    good = (["F"],) if forward_only else (["BW", "F"], ["B", "F", "W"])
    return set(have) != set(wanted) or any(sorted(ops) not in good for ops in have.values())


def made_and_used(program: Program) -> tuple[set[str], set[str]]:
    """Flaws of order on a rank, and of transfers, found by walking every rank's list with what it has."""
    order, transfer = set(), set()
    for rank, row in enumerate(program.ranks):
        done: set[tuple[str, int | None, int | None]] = set()
        here, sent = set(), set()
        total = {(a.op, a.subject.index, a.microbatch) for a in row}
        for a in row:
            s, m = a.subject.index or 0, a.microbatch
            if a.op == "RECV":
                here.add((a.subject, m))
            elif a.op == "SEND":
                sent.add((a.subject, m))
                maker = {("F", s, m)} if a.subject.kind == "act" else {("BW", s, m), ("B", s, m)}
                if not maker & done:
                    transfer.add(str(a))
            else:
                received = consumed_by(program, a)
                if received is not None and (received, m) not in here:
                    transfer.add(str(a))
                needs = _needs(program, a, rank)
                order |= {str(a)} if any(not alternatives & done for alternatives in needs) else set()
                if a.op in ("B", "BW") and ("R", s, m) in total and ("R", s, m) not in done:
                    order.add(str(a))
                done.add((a.op, s, m))
        for op, s, m in done:
            kind, other = ("act", (s or 0) + 1) if op == "F" else ("grad", (s or 0) - 1)
            goes = op in ("F", "B", "BW") and 0 <= other < len(program.stages) and program.stages[other] != rank
            if goes and (Subject(kind, s), m) not in sent:
                transfer.add(f"{op} of {s}@{m} is not sent")
    return order, transfer


def _needs(program: Program, a: Action, rank: int) -> list[set[tuple[str, int | None, int | None]]]:
    """What must have run before on the same rank: of each set, one."""
    s, m = a.subject.index or 0, a.microbatch
    here = lambda stage: 0 <= stage < len(program.stages) and program.stages[stage] == rank  # noqa: E731
    if a.op == "F":
        return [{("F", s - 1, m)}] if here(s - 1) else []
    if a.op == "W":
        return [{("B", s, m)}]
    later = [{("B", s + 1, m), ("BW", s + 1, m)}] if a.op != "R" and here(s + 1) else []
    return [{("F", s, m)}, *later]


def link(program: Program) -> bool:
    """Two ranks do not agree on the order of what one sends to the other."""
    lists: dict[tuple[str, int, int], list[tuple[Subject, int | None]]] = defaultdict(list)
    for rank, row in enumerate(program.ranks):
        for a in row:
            if a.op in TRANSFER and isinstance(a.peer, int):
                ends = (rank, a.peer) if a.op == "SEND" else (a.peer, rank)
                lists[a.op, *ends].append((a.subject, a.microbatch))
    return any(lists["SEND", i, j] != lists["RECV", i, j] for _, i, j in list(lists))


def accumulation(program: Program) -> bool:
    """Weight gradients of a stage in another order than that of the microbatches."""
    added: dict[int | None, list[int | None]] = defaultdict(list)
    for row in program.ranks:
        for a in row:
            if a.op in ("BW", "W"):
                added[a.subject.index].append(a.microbatch)
    return any(order != sorted(order, key=lambda m: m or 0) for order in added.values())


def really(program: Program, said: str) -> bool:
    """Whether the program is wrong in the way that a refusal says."""
    if said == "deadlock":
        with pytest.raises(DeadlockError):
            interpret(program, "independent")
        return True
    order, transfer = ({}, {}) if said in ("form", "coverage") else made_and_used(program)
    return {
        "form": lambda: form(program),
        "coverage": lambda: coverage(program),
        "order": lambda: bool(order),
        "transfer": lambda: bool(transfer),
        "link": lambda: link(program),
        "accumulation": lambda: accumulation(program),
    }[said]()


# ---------------------------------------------------------------- mutations


def test_what_is_accepted_runs_and_what_is_refused_is_wrong_as_it_says() -> None:
    seen: Counter[str | None] = Counter()

    @settings(max_examples=700, deadline=None, derandomize=True)
    @given(mutated())
    def holds(program: Program) -> None:
        said = refusal(program)
        seen[said] += 1
        if said is None:
            interpret(program, "independent")
            assert not form(program) and not coverage(program) and not link(program) and not accumulation(program)
            assert made_and_used(program) == (set(), set())
        else:
            assert said in CLASSES and really(program, said), said

    holds()
    assert set(seen) == {None, *CLASSES}, f"the draws must hold every class, got {seen}"


# ---------------------------------------------------------------- collectives of several ranks


def run_collectives(program: Program, layout: StateLayout) -> None:
    """Transfers as in ``interpret``, and the collectives that join pipeline coordinates."""
    ties = layout.tied_coordinates()

    def main(group: object) -> None:
        groups = {t: group.split([list(coords)], f"tie{t}") for t, coords in sorted(ties.items())}
        received: dict[tuple[Subject, int | None], object] = {}
        works = []
        for a in program.ranks[group.rank]:
            if a.op in TRANSFER:
                work = (group.send if a.op == "SEND" else group.recv)(torch.ones(1), a.peer)
                works.append(work)
                if a.op == "RECV":
                    received[a.subject, a.microbatch] = work
            elif a.op == "CLIP":
                group.all_reduce(torch.ones(1)).wait()
            elif a.op == "TIE":
                for t in sorted(layout.buckets[group.rank][a.subject.index].tied):
                    groups[t].all_reduce(torch.ones(1)).wait()
            elif subject := consumed_by(program, a) if a.subject.kind == "stage" else None:
                received[subject, a.microbatch].wait()
        for work in works:
            work.wait()

    run_threads(len(program.ranks), main, deadline=20.0)


@st.composite
def with_state(draw: st.DrawFn) -> tuple[Program, StateLayout]:
    """A whole step of stages of one unit, tied in pairs, and exchanges of the actions after the computes."""
    p, m = draw(st.integers(2, 4)), draw(st.integers(1, 3))
    buckets = [[BucketInfo(0, (c,), tied=())] for c in range(p)]
    pairs = draw(st.lists(st.tuples(st.integers(0, p - 1), st.integers(0, p - 1)), min_size=1, max_size=5))
    for t, (a, b) in enumerate(pairs):
        for c in sorted({a, b}) if a != b else ():
            buckets[c].append(BucketInfo(len(buckets[c]), (c,), tied=(t,)))
    layout = StateLayout(tuple((c,) for c in range(p)), tuple(map(tuple, buckets)))
    program = add_state(
        add_communication(schedules.NAMED[draw(st.sampled_from(("1f1b", "zb_h1")))](p, m)), layout, zero1()
    )
    rows = [list(row) for row in program.ranks]
    for _ in range(draw(st.integers(0, 3))):
        row = rows[draw(st.integers(0, p - 1))]
        late = [i for i, a in enumerate(row[:-1]) if a.op in ("TIE", "REDUCE", "CLIP", "STEP")]
        pairs_of_ties = [i for i, a in enumerate(row[:-2]) if (a.op, row[i + 2].op) == ("TIE", "TIE")]
        if pairs_of_ties and draw(st.booleans()):
            i = draw(st.sampled_from(pairs_of_ties))
            row[i : i + 4] = row[i + 2 : i + 4] + row[i : i + 2]
        elif late and draw(st.booleans()):
            i = draw(st.sampled_from(late))
            j = min(len(row) - 1, i + draw(st.integers(1, 3)))
            row.insert(j, row.pop(i))
    return replace_ranks(program, rows), layout


def test_collectives_across_coordinates_run_or_block_as_said() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(with_state())
    def holds(drawn: tuple[Program, StateLayout]) -> None:
        program, layout = drawn
        try:
            verify(program, layout=layout, placement=zero1())
        except ProgramError as error:
            said = str(error).splitlines()[0]
            seen["deadlock" if "deadlock, " in said else "order"] += 1
            if "deadlock, " in said:
                with pytest.raises(DeadlockError):
                    run_collectives(program, layout)
            else:
                assert "must come after" in said or "comes before" in said, said
        else:
            seen["accepted"] += 1
            run_collectives(program, layout)

    holds()
    assert set(seen) == {"accepted", "deadlock", "order"}, seen
