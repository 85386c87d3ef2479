"""Deadlocks: found, named, and held against ranks that really run or block."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from program_edits import LAYOUT, REAL, check, edit, interpret, naive_communication, swap, whole
from triloom import schedules
from triloom.actions import Program, replace_ranks
from triloom.errors import DeadlockError, ProgramError
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state
from triloom.placement import zero1
from triloom.verify import inside, state_footprint, verify


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
        return [("a", "sum", 1), ("b", "sum", 1)][:: 1 - 2 * rank] if action.op == "CLIP" else []

    both = {"a": [(0, 1)], "b": [(0, 1)]}
    with pytest.raises(ProgramError, match=r"deadlock, CLIP:all \(rank \d, .* wait"):
        check(whole(), footprint=footprint, groups=both)
    check(whole(), footprint=footprint, groups={"a": inside(2), "b": [(0, 1)]})


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


# ---------------------------------------------------------------- the proof against real ranks


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
    assume(acceptable(program, lanes) is not None)  # naive receives of looped schedules do not match in order
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
