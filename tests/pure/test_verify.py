"""The verifier: every class of refusal, the words of a refusal, and the proof held against real ranks."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triloom import schedules
from triloom.actions import COMPUTE, TRANSFER, Action, Program, parse_action, replace_ranks
from triloom.errors import ConfigError, DeadlockError, ProgramError
from triloom.groups.threads import run_threads
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state, consumed_by, produced
from triloom.placement import zero0, zero1
from triloom.verify import StageBytes, inside, state_footprint, verify
from triloom.verify.facts import read
from triloom.verify.peak import _sent_lives

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


# ---------------------------------------------------------------- deadlocks


@pytest.mark.parametrize("lanes", ["blocking", "per_rank", "per_peer"])
def test_naive_transfers_of_one_f_one_b_deadlock_and_the_two_sends_are_named(lanes):
    with pytest.raises(ProgramError) as refused:
        verify(naive_communication(schedules.one_f_one_b(2, 4)), lanes=lanes)
    text = str(refused.value)
    assert "deadlock, SEND:act0@1>1 (rank 0, step 3) and SEND:grad1@0>0 (rank 1, step 3) wait for each other" in text
    assert ">>  3 SEND:act0@1>1" in text
    assert ">>  3 SEND:grad1@0>0" in text
    assert "   11 SEND:act0@3>1" in text  # the rest of the grid is there, unmarked


@pytest.mark.parametrize("early", [0, 1, 2])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_one_f_one_b_needs_a_lane_per_direction(p, early):
    program = add_communication(schedules.one_f_one_b(p, p + 2), early)
    for lanes, runs in {"independent": 1, "per_direction": 1, "per_peer": 0, "per_rank": 0, "blocking": 0}.items():
        if runs:
            assert verify(program, lanes=lanes).lanes == lanes
        else:
            with pytest.raises(ProgramError, match="deadlock"):
                verify(program, lanes=lanes)


def test_forward_only_and_naive_gpipe_run_even_when_blocking():
    for name in ("forward", "gpipe"):
        for p, m in ((1, 1), (2, 3), (4, 6)):
            verify(naive_communication(schedules.NAMED[name](p, m)), lanes="blocking")


def test_a_deadlock_without_any_lane():
    """Rank 0 wants the gradient of microbatch 0 before it makes activation 1, rank 1 the other way round."""
    one, both = schedules.gpipe(1, 2).ranks[0], schedules.gpipe(2, 2)
    impatient = Program((tuple(one[i] for i in (0, 2, 1, 3)), both.ranks[1]), (0, 1), 2)
    with pytest.raises(ProgramError, match="deadlock") as refused:
        verify(add_communication(impatient))
    text = str(refused.value)
    assert "BW:stage0@0 (rank 0, step 3) starts only after RECV:grad1@0<1" in text
    assert "F:stage1@1 (rank 1, step 3) starts only after RECV:act0@1<0" in text


def test_a_cycle_across_groups_is_found_though_each_group_is_in_order():
    """Three groups of two members: each pair agrees on its only collective, all three together do not."""
    program = schedules.forward_only(3, 2)
    program = Program(tuple(row[:2] for row in program.ranks), (0, 1, 2), 2)
    groups = {"a": [(0, 1)], "b": [(1, 2)], "c": [(0, 2)]}
    order = {(0, 0): "a", (0, 1): "c", (1, 0): "b", (1, 1): "a", (2, 0): "c", (2, 1): "b"}

    def footprint(rank, action):
        return [(order[rank, action.microbatch], "all_reduce", 4)] if action.op == "F" else []

    with pytest.raises(ProgramError, match="deadlock"):
        verify(add_communication(program), footprint=footprint, groups=groups)
    order[0, 0], order[0, 1] = "c", "a"
    order[2, 0], order[2, 1] = "c", "b"
    order[1, 0], order[1, 1] = "a", "b"
    with pytest.raises(ProgramError, match="deadlock"):  # still: rank 1 computes only after rank 0, which is in "c"
        verify(add_communication(program), footprint=footprint, groups=groups)
    free = {"a": [(0,), (1,)], "b": [(1,), (2,)], "c": [(0,), (2,)]}
    verify(add_communication(program), footprint=footprint, groups=free)


def test_collectives_of_one_action_run_one_after_the_other():
    def footprint(rank, action):
        return [("a", "sum", 1), ("b", "sum", 1)][:: 1 - 2 * rank] if action.op == "F" else []

    groups = {"a": [(0, 1)], "b": [(0, 1)]}
    apart = Program(tuple(row[:1] for row in schedules.forward_only(2, 1).ranks), (0, 1), 1)
    program = add_communication(apart)
    with pytest.raises(ProgramError, match="deadlock"):
        verify(program, footprint=footprint, groups=groups)


def reduces_over(names):
    """The state's footprint with some collectives on groups of both coordinates: names[rank, text of the action]."""
    usual = state_footprint(LAYOUT)

    def footprint(rank, action):
        if (rank, str(action)) in names:
            return [(names[rank, str(action)], "sum", 1)]
        return usual(rank, action)

    return {"footprint": footprint, "groups": {name: [(0, 1)] for name in names.values()}}


def test_reduces_are_posted_on_lanes():
    """Rank 0 posts REDUCE 1, then 0; rank 1 posts 0, then 1: pairs in order and pairs crossed."""
    in_order = {
        (0, "REDUCE:grads.1"): "a",
        (0, "REDUCE:grads.0"): "b",
        (1, "REDUCE:grads.0"): "a",
        (1, "REDUCE:grads.1"): "b",
    }
    order = [[str(a) for a in row if a.op == "REDUCE"] for row in whole().ranks]
    assert order == [["REDUCE:grads.1", "REDUCE:grads.0"], ["REDUCE:grads.0", "REDUCE:grads.1"]]
    check(whole(), **reduces_over(in_order))
    crossed = {**in_order, (1, "REDUCE:grads.0"): "b", (1, "REDUCE:grads.1"): "a"}
    check(whole(), **reduces_over(crossed))
    fifo = one_lane_for_collectives
    check(whole(), **reduces_over(in_order), lanes=fifo)
    with pytest.raises(
        ProgramError, match=r"deadlock, REDUCE:grads\.\d .* and REDUCE:grads\.\d .* wait for each other"
    ):
        check(whole(), **reduces_over(crossed), lanes=fifo)


def one_lane_for_collectives(post):
    return "own" if post.group is None else ("collectives",)


def test_clip_waits_for_every_reduce_and_step_for_its_own():
    late = {(0, "REDUCE:grads.1"): "a", (1, "UNSHARD:params.0"): "a"}
    with pytest.raises(ProgramError, match=r"CLIP:all \(rank 0, step \d+\) starts only after REDUCE:grads\.1"):
        check(whole(), **reduces_over(late))
    program = add_state(add_communication(schedules.one_f_one_b(2, 3)), LAYOUT, zero1(), clip=False)
    check(program, **reduces_over(late))
    both = {**late, (1, "REDUCE:grads.0"): "b", (0, "UNSHARD:params.1"): "b"}
    with pytest.raises(ProgramError, match=r"STEP:params\.1 \(rank 0, step \d+\) starts only after REDUCE:grads\.1"):
        check(program, **reduces_over(both))


def test_ties_in_another_order_on_one_rank_deadlock():
    buckets = tuple(tuple(BucketInfo(k, (2 * c + k,), tied=(k,)) for k in (0, 1)) for c in (0, 1))
    layout = StateLayout(((0, 1), (2, 3)), buckets)
    program = add_state(add_communication(schedules.one_f_one_b(2, 3)), layout, zero1())
    verify(program, layout=layout)
    crossed = edit(edit(program, 0, swap("TIE:grads.0", "TIE:grads.1")), 0, swap("REDUCE:grads.0", "REDUCE:grads.1"))
    with pytest.raises(ProgramError, match=r"deadlock, TIE:grads\.\d \(rank \d, step \d+\) and TIE:grads"):
        verify(crossed, layout=layout)


def test_a_large_program_is_refused_with_a_window():
    with pytest.raises(ProgramError) as refused:
        verify(naive_communication(schedules.one_f_one_b(16, 40)), lanes="blocking")
    text = str(refused.value)
    assert "(10 of 16 ranks not shown)" in text
    assert "..." in text
    assert text.count(">>") >= 2
    assert len(text.splitlines()) < 60


# ---------------------------------------------------------------- every other refusal

REFUSALS = {
    # computes
    "F dropped": (1, drop("F:stage1@1"), "stage 1 (rank 1) has BW for microbatch 1, it needs F BW or F B W"),
    "BW dropped": (0, drop("BW:stage0@0"), "stage 0 (rank 0) has F for microbatch 0, it needs"),
    "BW twice": (0, after("BW:stage0@0", "BW:stage0@0"), "repeats step"),
    "BW and W": (0, after("BW:stage0@0", "W:stage0@0"), "has F BW W for microbatch 0"),
    "B without W": (0, turn("BW:stage0@0", "B:stage0@0"), "has F B for microbatch 0"),
    "W before B": (0, split, "W:stage0@0 (rank 0, step 5) comes before B:stage0@0 (rank 0, step 6), which it needs"),
    "backward before F": (0, swap("F:stage0@0", "BW:stage0@0"), "BW:stage0@0 (rank 0, step 0) comes before F:stage0@0"),
    "R after the backward": (0, after("BW:stage0@0", "R:stage0@0"), "comes before R:stage0@0"),
    "R before F": (0, before("F:stage0@0", "R:stage0@0"), "comes before F:stage0@0"),
    "stage of another rank": (0, turn("F:stage0@1", "F:stage1@1"), "stage 1 runs on rank 1"),
    "no such stage": (0, turn("F:stage0@1", "F:stage7@1"), "stages are 0 to 1"),
    "no such microbatch": (0, turn("F:stage0@1", "F:stage0@3"), "microbatches are 0 to 2"),
    "no microbatch": (0, turn("F:stage0@1", "F:stage0"), "microbatches are 0 to 2"),
    "wrong subject": (0, turn("F:stage0@1", "F:act0@1"), "F is about stage or unit"),
    "no rule": (0, after("F:stage0@1", "FETCH:params.0<nvme"), "verify has no rule for FETCH"),
    # units
    "unit dropped": (0, drop("BW:unit1@2"), "runs units [0], it needs [1, 0]"),
    "units out of order": (0, swap("BW:unit1@2", "BW:unit0@2"), "runs units [0, 1], it needs [1, 0]"),
    "unit and stage": (0, after("BW:unit0@2", "BW:stage0@2"), "runs whole and by unit"),
    "no such unit": (0, turn("BW:unit0@2", "BW:unit9@2"), "the layout does not say which stage unit 9 belongs to"),
    # transfers
    "SEND dropped": (0, drop("SEND:act0@1>1"), "SEND:act0@1>1 is missing on rank 0, where it is made by F:stage0@1"),
    "RECV dropped": (1, drop("RECV:act0@1<0"), "RECV:act0@1<0 is missing on rank 1, where it is used by F:stage1@1"),
    "SEND twice": (0, after("SEND:act0@1>1", "SEND:act0@1>1"), "repeats step"),
    "sends swapped": (
        1,
        lambda r: (r.remove("SEND:grad1@0>0"), after("SEND:grad1@1>0", "SEND:grad1@0>0")(r)),
        "transfer 0 from rank 1 to rank 0 is sent by SEND:grad1@1>0",
    ),
    "receives swapped": (1, swap("RECV:act0@0<0", "RECV:act0@1<0"), "comes before RECV:act0@0<0"),
    "wrong peer": (0, turn("SEND:act0@1>1", "SEND:act0@1>0"), "belongs on rank 0, with rank 1 as peer"),
    "peer of a tier": (0, turn("SEND:act0@1>1", "SEND:act0@1>nvme"), "belongs on rank 0, with rank 1 as peer"),
    "wrong rank": (0, turn("SEND:act0@1>1", "SEND:grad1@1>0"), "belongs on rank 1, with rank 0 as peer"),
    "nobody to send to": (1, after("F:stage1@1", "SEND:act1@1>0"), "no two of the 2 stages exchange this"),
    "SEND before its producer": (0, swap("F:stage0@1", "SEND:act0@1>1"), "which makes what it sends"),
    "RECV after its use": (0, swap("RECV:grad1@0<1", "BW:stage0@0"), "which brings what it uses"),
    # state
    "REDUCE dropped": (0, drop("REDUCE:grads.1"), "REDUCE:grads.1 is missing on rank 0"),
    "REDUCE early": (
        0,
        swap("REDUCE:grads.1", "BW:unit1@2"),
        "REDUCE:grads.1 (rank 0, step 11) must come after BW:unit1@2",
    ),
    "REDUCE twice": (0, after("REDUCE:grads.1", "REDUCE:grads.1"), "repeats step"),
    "REDUCE of no bucket": (0, after("REDUCE:grads.1", "REDUCE:grads.2"), "rank 0 has 2 buckets"),
    "TIE dropped": (0, drop("TIE:grads.0"), "TIE:grads.0 is missing on rank 0"),
    "TIE late": (0, swap("TIE:grads.0", "REDUCE:grads.0"), "must come after TIE:grads.0"),
    "TIE of nothing": (0, after("REDUCE:grads.1", "TIE:grads.1"), "nothing in it is tied"),
    "CLIP dropped": (0, drop("CLIP:all"), "CLIP:all is missing on rank 0"),
    "CLIP early": (0, swap("CLIP:all", "REDUCE:grads.0"), "must come after REDUCE:grads.0"),
    "STEP dropped": (1, drop("STEP:params.1"), "STEP:params.1 is missing on rank 1"),
    "STEP before CLIP": (1, swap("STEP:params.0", "CLIP:all"), "must come after CLIP:all"),
    "UNSHARD dropped": (1, drop("UNSHARD:params.0"), "UNSHARD:params.0 is missing on rank 1"),
    "UNSHARD early": (1, swap("UNSHARD:params.0", "STEP:params.0"), "must come after STEP:params.0"),
    "WEIGH dropped": (1, drop("WEIGH:all"), "WEIGH:all is missing on rank 1"),
    "WEIGH late": (1, swap("WEIGH:all", "BW:stage1@0"), "comes before F:stage1@0"),
    "WEIGH elsewhere": (0, before("F:stage0@0", "WEIGH:all"), "the weights are known where the last stage is, rank 1"),
    "state with a microbatch": (0, turn("REDUCE:grads.1", "REDUCE:grads.1@0"), "REDUCE has no microbatch"),
    "state without a number": (0, turn("REDUCE:grads.1", "REDUCE:grads"), "the subject needs a number"),
    "all with a number": (0, turn("CLIP:all", "CLIP:all.0"), "the subject needs no number"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    rank, change, why = REFUSALS[case]
    program = edit(whole(), rank, change)
    with pytest.raises(ProgramError) as refused:
        check(program)
    assert why in str(refused.value)
    assert "rank 0  " in str(refused.value)  # the grid
    check(whole())  # and it was the change that did it


def test_weight_gradients_must_be_added_in_microbatch_order():
    row = "F:stage0@0 F:stage0@1 B:stage0@0 B:stage0@1 W:stage0@0 W:stage0@1"
    accepted = Program((tuple(map(parse_action, row.split())),), (0,), 2)
    verify(accepted)
    with pytest.raises(ProgramError, match=r"W:stage0@0 .* adds to weight gradients after W:stage0@1 .* not in order"):
        verify(edit(accepted, 0, swap("W:stage0@0", "W:stage0@1")))


def test_a_bucket_is_reduced_after_the_last_of_its_units():
    layout = StateLayout(((0, 1, 2),), ((BucketInfo(0, (1, 2)), BucketInfo(1, (0,))),))
    program = add_state(schedules.gpipe(1, 2), layout, zero1())
    verify(program, layout=layout)
    with pytest.raises(ProgramError, match=r"REDUCE:grads\.0 .* must come after BW:unit1@1"):
        verify(edit(program, 0, swap("REDUCE:grads.0", "BW:unit1@1")), layout=layout)
    forward = edit(schedules.forward_only(1, 1), 0, lambda row: row.extend(["WEIGH:all", "REDUCE:grads.0"]))
    with pytest.raises(ProgramError, match=r"nothing adds gradients of units \[1, 2\]"):
        verify(forward, layout=layout)


def test_transfers_that_nothing_makes_or_uses():
    program = add_communication(schedules.forward_only(2, 1))
    program = edit(
        edit(program, 0, lambda row: row.append("RECV:grad1@0<1")), 1, lambda row: row.append("SEND:grad1@0>0")
    )
    with pytest.raises(ProgramError, match="nothing in the program makes or uses it"):
        verify(program)


def test_weights_are_summed_before_the_first_backward():
    late = edit(whole(), 1, lambda row: row.insert(row.index("BW:stage1@0") + 1, row.pop(row.index("WEIGH:all"))))
    with pytest.raises(ProgramError, match=r"BW:stage1@0 .* must come after WEIGH:all"):
        check(late)


def test_receives_in_another_order_than_the_sends():
    program = edit(early_gpipe(), 1, swap("RECV:act0@1<0", "RECV:act0@2<0"))
    with pytest.raises(ProgramError, match="transfer 1 from rank 0 to rank 1 is sent by SEND:act0@1>1"):
        verify(program)


def early_gpipe():
    return add_communication(schedules.gpipe(2, 3), early=2)


def test_placement_decides_on_the_gather():
    program = add_state(add_communication(schedules.one_f_one_b(2, 3)), LAYOUT, zero0())
    verify(program, layout=LAYOUT, placement=zero0())
    with pytest.raises(ProgramError, match=r"UNSHARD:params\.0 is missing on rank 0"):
        verify(program, layout=LAYOUT, placement=zero1())
    with pytest.raises(ProgramError, match="placement 'zero0' leaves nothing to gather"):
        verify(whole(), layout=LAYOUT, placement=zero0())
    verify(whole(), layout=LAYOUT)  # without a placement both are fine


def test_units_and_state_need_a_layout():
    with pytest.raises(ProgramError, match="there is no layout that says which stage unit"):
        verify(whole())
    program = edit(add_communication(schedules.gpipe(2, 1)), 0, lambda row: row.append("REDUCE:grads.0"))
    with pytest.raises(ProgramError, match="verified against a layout, none was given"):
        verify(program)


def test_members_of_a_group_must_issue_the_same():
    def footprint(size):
        def collectives(coord, action):
            tp = [("tp", "all_reduce", 64)] if action.op in COMPUTE else []
            both = [("both", "all_reduce", size(coord))] * (action.op == "CLIP") * (1 + (size(coord) == 3))
            return [*tp, *both, *state_footprint(LAYOUT)(coord, action)]

        return collectives

    groups = {"tp": inside(2), "both": [(0, 1)]}
    check(whole(), footprint=footprint(lambda c: 8), groups=groups)
    with pytest.raises(
        ProgramError, match=r"operation 0 of group 'both' is all_reduce of 8 bytes by CLIP:all \(rank 0"
    ):
        check(whole(), footprint=footprint(lambda c: 8 + c), groups=groups)
    with pytest.raises(ProgramError, match=r"operation 1 of group 'both'.* never meets rank 1"):
        check(whole(), footprint=lambda c, a: [("both", "sum", 1)] * (2 - c) * (a.op == "CLIP"), groups=groups)
    with pytest.raises(ProgramError, match=r"uses group 'both', which rank 0 is not in"):
        check(whole(), footprint=footprint(lambda c: 8), groups={"tp": inside(2)})
    with pytest.raises(ConfigError, match="must be disjoint"):
        check(whole(), groups={"x": [(0, 1), (1,)]})


def test_shapes_of_arguments():
    with pytest.raises(ConfigError, match="lanes 'many' is not one of independent, per_direction"):
        verify(early_gpipe(), lanes="many")
    with pytest.raises(ConfigError, match="sizes are of 1 stages"):
        verify(early_gpipe(), sizes=[StageBytes(input=1, output=1, held=1)])
    with pytest.raises(ConfigError, match="puts stages on coordinates"):
        verify(Program(((),), (0, 1), 1))


# ---------------------------------------------------------------- what a verdict says


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


# ---------------------------------------------------------------- the proof against real ranks

REAL = {"independent": "independent", "per_rank": "fifo", "blocking": "independent"}
"""Lanes of the proof, and of the Threads group that has them."""


def interpret(program, lanes):
    """Run the transfers of a program on strict-rendezvous ranks; every tensor must be the one meant."""

    def label(action):
        return torch.tensor(
            [float(action.subject.index * 100 + action.microbatch + 1000 * (action.subject.kind == "act"))]
        )

    def rank_main(group):
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

    run_threads(len(program.ranks), rank_main, deadline=20.0, lanes=REAL[lanes])


def acceptable(program, lanes):
    """True if proven, False if refused as a deadlock, None if refused for anything else."""
    try:
        verify(program, lanes=lanes)
    except ProgramError as error:
        return False if "deadlock" in str(error) else None
    return True


@st.composite
def shuffled(draw, lanes):
    """A schedule with transfers, then neighbours exchanged wherever the order of one rank allows it."""
    name = draw(st.sampled_from(sorted(schedules.NAMED)))
    p, m = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    passes = (naive_communication, add_communication, lambda x: add_communication(x, 2))
    program = draw(st.sampled_from(passes))(schedules.NAMED[name](p, m))
    for _ in range(draw(st.integers(0, 25))):
        rank = draw(st.integers(0, p - 1))
        row = list(program.ranks[rank])
        i = draw(st.integers(0, len(row) - 2)) if len(row) > 1 else 0
        row[i : i + 2] = row[i : i + 2][::-1]
        moved = replace_ranks(program, [row if r == rank else other for r, other in enumerate(program.ranks)])
        if acceptable(moved, lanes) is not None:
            program = moved
    return program


@pytest.mark.parametrize("lanes", REAL)
def test_what_is_proven_runs_and_what_is_refused_blocks(lanes):
    seen = set()

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(shuffled(lanes))
    def agree(program):
        verdict = acceptable(program, lanes)
        seen.add(verdict)
        if verdict:
            interpret(program, lanes)
        else:
            with pytest.raises(DeadlockError):
                interpret(program, lanes)

    agree()
    assert seen == {True, False}, "the draws must hold both kinds"
