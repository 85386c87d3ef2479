"""What a verdict says: what was proven, and the peak of memory."""

import time

import pytest

from program_edits import before, check, edit, naive_communication, whole
from triloom import schedules
from triloom.actions import COMPUTE, Program, parse_action
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state, consumed_by
from triloom.placement import zero1
from triloom.verify import StageBytes, verify
from triloom.verify.facts import read
from triloom.verify.peak import _sent_lives


def test_the_verdict_states_what_was_proven_and_assumed():
    verdict = check(whole(), sizes=[StageBytes(input=0, output=8, held=100), StageBytes(input=8, output=0, held=100)])
    assert verdict.in_flight == (2, 1)
    text = str(verdict)
    assert "accepted on independent lanes" in text
    assert "proven: no deadlock without any buffering" in text
    assert "assumed: the data- and tensor-parallel replicas" in text
    position = {place: i for i, place in enumerate(verdict.order)}
    assert len(position) == sum(map(len, whole().ranks))
    for rank, row in enumerate(whole().ranks):
        assert all(position[rank, s] < position[rank, s + 1] for s in range(len(row) - 1))


def test_peak_bytes_by_hand():
    size = StageBytes(input=3, output=5, held=100, deferred=40)
    one = Program((tuple(map(parse_action, ["F:stage0@0", "B:stage0@0", "W:stage0@0"])),), (0,), 1)
    # during F: input, held, output; during B: input, held, both gradients, deferred; during W: deferred
    assert verify(one, sizes=[size]).peak_bytes == (3 + 100 + 5 + 3 + 40,)
    again = edit(one, 0, before("B:stage0@0", "R:stage0@0"))
    assert verify(again, sizes=[size]).peak_bytes == (3 + 100 + 5 + 3 + 40,)
    # a sender learns nothing in a program without backwards: all that it sent may still be on the way
    forward = add_communication(schedules.forward_only(2, 4))
    assert verify(forward, sizes=[StageBytes(input=0, output=7, held=0)] * 2).peak_bytes[0] == 4 * 7
    # with them, its gradient tells that an activation has come: two of those, and the gradient's own room
    both = naive_communication(schedules.one_f_one_b(2, 6))
    assert verify(both, sizes=[StageBytes(input=0, output=7, held=0)] * 2).peak_bytes[0] == 3 * 7


def reach_without(program, lost):
    """The last step that each rank starts if one transfer never ends (independent lanes)."""
    reached, moved = [-1] * len(program.ranks), True
    posted = set()
    while moved:
        moved = False
        for rank, row in enumerate(program.ranks):
            while reached[rank] + 1 < len(row):
                a = row[reached[rank] + 1]
                need = (consumed_by(program, a), a.microbatch) if a.op in COMPUTE else (None, None)
                if need[0] and (need == lost or not {("SEND", *need), ("RECV", *need)} <= posted):
                    break
                posted.add((a.op, a.subject, a.microbatch))
                reached[rank] += 1
                moved = True
    return reached


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("early", [0, 1])
def test_a_sent_tensor_counts_for_as_long_as_its_transfer_can_last(name, early):
    """Lose one transfer: the tensor is counted exactly as far as its sender can come."""
    for p, m in ((2, 5), (3, 4), (4, 6)):
        program = add_communication(schedules.NAMED[name](p, m), early)
        facts = read(program, None)
        ends = {
            (r, first): last for r, first, last, _ in _sent_lives(facts, [StageBytes(input=1, output=1, held=0)] * p)
        }
        for (subject, microbatch), (rank, step) in facts.sends.items():
            counted = ends.get((rank, step), step)
            assert counted == reach_without(program, (subject, microbatch))[rank], (subject, microbatch)


def test_peak_follows_in_flight():
    for name in ("gpipe", "1f1b"):
        verdict = verify(
            add_communication(schedules.NAMED[name](4, 9)), sizes=[StageBytes(input=0, output=0, held=9)] * 4
        )
        assert verdict.peak_bytes == tuple(9 * n for n in verdict.in_flight)


def test_a_large_program_is_proven_quickly():
    start = time.process_time()
    units = tuple(tuple(range(4 * s, 4 * s + 4)) for s in range(64))
    layout = StateLayout(units, tuple(tuple(BucketInfo(k, (u,)) for k, u in enumerate(row)) for row in units))
    program = add_state(add_communication(schedules.one_f_one_b(64, 256)), layout, zero1())
    verify(program, layout=layout, lanes="per_direction", sizes=[StageBytes(input=1, output=1, held=1)] * 64)
    assert time.process_time() - start < 6  # about 1 s on an idle core
