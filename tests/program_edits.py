"""Programs for the tests of the verifier: a whole one, and small edits of its text."""

import torch

from triloom import schedules
from triloom.actions import TRANSFER, Action, parse_action, replace_ranks
from triloom.groups.threads import run_threads
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state, consumed_by, produced
from triloom.placement import zero1
from triloom.verify import verify

LAYOUT = StateLayout(
    units=((0, 1), (2, 3)),
    buckets=(
        (BucketInfo(0, (0,), tied=(0,)), BucketInfo(1, (1,))),
        (BucketInfo(0, (2,)), BucketInfo(1, (3,), tied=(0,))),
    ),
)


def naive_communication(program):
    """What one writes first: send after the producer, receive right before the consumer."""

    def row(actions):
        for a in actions:
            if subject := consumed_by(program, a):
                yield Action("RECV", subject, a.microbatch, program.stages[subject.index])
            yield a
            if pair := produced(program, a):
                yield pair[0]

    return replace_ranks(program, map(row, program.ranks))


def whole(m=3):
    return add_state(add_communication(schedules.one_f_one_b(2, m)), LAYOUT, zero1())


def check(program, **kw):
    return verify(program, layout=LAYOUT, placement=zero1(), **kw)


def edit(program, rank, change):
    """The program with one rank's list of texts changed in place by ``change``."""
    row = [str(a) for a in program.ranks[rank]]
    change(row)
    rows = list(program.ranks)
    rows[rank] = tuple(map(parse_action, row))
    return replace_ranks(program, rows)


def drop(text):
    return lambda row: row.remove(text)


def swap(a, b):
    def change(row):
        i, j = row.index(a), row.index(b)
        row[i], row[j] = row[j], row[i]

    return change


def turn(a, b):
    def change(row):
        row[row.index(a)] = b

    return change


def after(text, new):
    return lambda row: row.insert(row.index(text) + 1, new)


def before(text, new):
    return lambda row: row.insert(row.index(text), new)


def split(row):
    row[row.index("BW:stage0@0")] = "W:stage0@0"
    row.insert(row.index("W:stage0@0") + 1, "B:stage0@0")


REAL = {"independent": "independent", "per_rank": "fifo", "blocking": "independent"}
"""Lanes of the proof, and of the Threads group that has them."""


def interpret(program, lanes):
    """Run the transfers of a program on strict-rendezvous ranks; every tensor must be the one meant."""
    run_threads(
        len(program.ranks), lambda group: interpret_rank(group, program, lanes), deadline=20.0, lanes=REAL[lanes]
    )


def interpret_rank(group, program, lanes):
    """One rank's part of a program's transfers; every tensor must be the one meant."""

    def label(action):
        return torch.tensor(
            [float(action.subject.index * 100 + action.microbatch + 1000 * (action.subject.kind == "act"))]
        )

    received, posted = {}, []
    for action in program.ranks[group.rank]:
        if action.op in TRANSFER:
            tensor = label(action) if action.op == "SEND" else torch.zeros(1)
            work = (group.send if action.op == "SEND" else group.recv)(tensor, action.peer)
            posted.append(work)
            if action.op == "RECV":
                received[action.subject, action.microbatch] = (work, tensor, label(action))
            if lanes == "blocking":
                work.wait()
        elif subject := consumed_by(program, action):
            work, tensor, want = received[subject, action.microbatch]
            work.wait()
            assert torch.equal(tensor, want), str(action)
    for work in posted:
        work.wait()
