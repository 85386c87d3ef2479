"""Passes add what they name, where they say, and nothing else."""

import itertools

import pytest

from triloom import schedules
from triloom.actions import COMPUTE, Action, Program, Subject, compute
from triloom.errors import ConfigError, ProgramError
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state
from triloom.placement import zero0, zero1
from triloom.verify import verify


def text(row):
    return " ".join(map(str, row))


def interleaved(coordinates, chunks, microbatches):
    """All forwards, then all backwards, stage s on coordinate s % coordinates: a shape that is not a chain."""
    stages = tuple(s % coordinates for s in range(coordinates * chunks))
    rows = []
    for c in range(coordinates):
        own = [s for s in range(len(stages)) if stages[s] == c]
        rows.append(
            [compute("F", s, m) for s in own for m in range(microbatches)]
            + [compute("BW", s, m) for s in reversed(own) for m in range(microbatches)]
        )
    return Program(tuple(map(tuple, rows)), stages, microbatches, "interleaved")


# ---------------------------------------------------------------- communication


def test_transfers_of_one_f_one_b():
    program = add_communication(schedules.one_f_one_b(2, 2))
    assert text(program.ranks[0]) == (
        "F:stage0@0 SEND:act0@0>1 RECV:grad1@0<1 F:stage0@1 SEND:act0@1>1 RECV:grad1@1<1 BW:stage0@0 BW:stage0@1"
    )
    assert text(program.ranks[1]) == (
        "RECV:act0@0<0 F:stage1@0 RECV:act0@1<0 BW:stage1@0 SEND:grad1@0>0 F:stage1@1 BW:stage1@1 SEND:grad1@1>0"
    )


@pytest.mark.parametrize("early", [0, 1, 2, 5])
@pytest.mark.parametrize("name", schedules.NAMED)
def test_receives_are_posted_early_and_in_the_order_of_the_sends(name, early):
    for p, m in itertools.product((1, 2, 3, 5), (1, 2, 4, 7)):
        plain = schedules.NAMED[name](p, m)
        program = add_communication(plain, early)
        assert [[a for a in row if a.op in COMPUTE] for row in program.ranks] == [list(row) for row in plain.ranks]
        assert verify(program).order  # matched in order, among the rest
        for row in program.ranks:
            computes = [a for a in row if a.op in COMPUTE]
            for i, a in enumerate(row):
                if a.op == "SEND":
                    made = ("F",) if a.subject.kind == "act" else ("BW", "B")
                    assert row[i - 1] in [compute(op, a.subject.index, a.microbatch) for op in made]
                if a.op == "RECV":
                    act = a.subject.kind == "act"
                    ops, stage = (("F",), a.subject.index + 1) if act else (("BW", "B"), a.subject.index - 1)
                    uses = [compute(op, stage, a.microbatch) for op in ops]
                    use = next(i for i, c in enumerate(computes) if c in uses)
                    posted = sum(b.op in COMPUTE for b in row[:i])
                    assert posted <= max(0, use - early)


def test_stages_that_share_a_coordinate_need_no_transfer():
    chain = schedules.gpipe(3, 2)
    one = Program((tuple(a for s in (0, 1, 2) for a in chain.ranks[s][:2]),), (0, 0, 0), 2)
    assert add_communication(one) == one
    both = Program((one.ranks[0][:4], one.ranks[0][4:]), (0, 0, 1), 2, "shared")
    assert [str(a) for a in add_communication(both).ranks[0] if a.op == "SEND"] == ["SEND:act1@0>1", "SEND:act1@1>1"]


def test_many_stages_per_coordinate():
    """Activations and gradients of several stages share a link; order is kept over all of them."""
    for c, v, m in itertools.product((2, 3), (2, 3), (1, 4)):
        assert verify(add_communication(interleaved(c, v, m)), lanes="per_direction").in_flight == (v * m,) * c


def test_receives_follow_the_order_of_the_sends_even_if_they_are_used_in_another():
    forward = schedules.forward_only(2, 3)
    program = add_communication(Program((forward.ranks[0], forward.ranks[1][::-1]), (0, 1), 3))
    assert text(program.ranks[1]) == "RECV:act0@0<0 RECV:act0@1<0 RECV:act0@2<0 F:stage1@2 F:stage1@1 F:stage1@0"
    verify(program)


def test_communication_refuses_what_is_not_a_schedule():
    with pytest.raises(ProgramError, match=r"rank 0 has RECV:grad1@0<1.*run it on the schedule"):
        add_communication(add_communication(schedules.gpipe(2, 1)))
    with pytest.raises(ConfigError, match="early=-1"):
        add_communication(schedules.gpipe(2, 1), early=-1)
    headless = Program((schedules.gpipe(2, 1).ranks[0], ()), (0, 1), 1)
    with pytest.raises(ProgramError, match=r"nothing on rank 1 uses RECV:act0@0<0"):
        add_communication(headless)


# ---------------------------------------------------------------- state

TIED = StateLayout(
    units=((0, 1, 2), (3, 4, 5)),
    buckets=(
        (BucketInfo(0, (0,), tied=(0,)), BucketInfo(1, (1, 2))),
        (BucketInfo(0, (3, 4)), BucketInfo(1, (4,)), BucketInfo(2, (5,), tied=(0,))),
    ),
)


def lowered(name="1f1b", layout=TIED, placement=None, m=2, **kw):
    return add_state(add_communication(schedules.NAMED[name](2, m)), layout, placement or zero1(), **kw)


def test_state_of_two_tied_stages():
    program = lowered()
    assert text(program.ranks[0]).split("BW:stage0@0 ")[1] == (
        "BW:unit2@1 BW:unit1@1 REDUCE:grads.1 BW:unit0@1 TIE:grads.0 REDUCE:grads.0 CLIP:all "
        "STEP:params.0 UNSHARD:params.0 STEP:params.1 UNSHARD:params.1"
    )
    assert text(program.ranks[1]).startswith("WEIGH:all RECV:act0@0<0 F:stage1@0")
    # the last gradient that rank 0 waits for leaves before anything is reduced after it, the tie comes last
    assert text(program.ranks[1]).split("F:stage1@1 ")[1] == (
        "BW:unit5@1 BW:unit4@1 REDUCE:grads.1 BW:unit3@1 SEND:grad1@1>0 REDUCE:grads.0 TIE:grads.2 REDUCE:grads.2 "
        "CLIP:all STEP:params.0 UNSHARD:params.0 STEP:params.1 UNSHARD:params.1 STEP:params.2 UNSHARD:params.2"
    )


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("placement", [zero0(), zero1()], ids=lambda p: p.name)
@pytest.mark.parametrize("clip", [True, False])
def test_state_is_proven_on_every_lane_that_runs_the_schedule(name, placement, clip):
    for m in (1, 2, 5):
        program = lowered(name, placement=placement, m=m, clip=clip)
        for lanes in ("independent", "per_direction"):
            verify(program, lanes=lanes, layout=TIED, placement=placement)
        ops = {a.op for row in program.ranks for a in row}
        assert ("UNSHARD" in ops) == (placement.name == "zero1")
        assert ("CLIP" in ops) == clip


def test_a_tie_inside_one_coordinate_is_reduced_as_early_as_others():
    layout = StateLayout(((0, 1, 2),), ((BucketInfo(0, (0,)), BucketInfo(1, (1, 2), tied=(0,))),))
    program = add_state(schedules.gpipe(1, 1), layout, zero0())
    assert text(program.ranks[0]) == (
        "WEIGH:all F:stage0@0 BW:unit2@0 BW:unit1@0 TIE:grads.1 REDUCE:grads.1 BW:unit0@0 REDUCE:grads.0 CLIP:all "
        "STEP:params.0 STEP:params.1"
    )
    verify(program, layout=layout, placement=zero0())


def test_ties_are_summed_in_their_own_order_whatever_the_buckets():
    buckets = (
        (BucketInfo(0, (0,), (1,)), BucketInfo(1, (1,), (0,))),
        (BucketInfo(0, (2,), (0,)), BucketInfo(1, (3,), (1,))),
    )
    layout = StateLayout(((0, 1), (2, 3)), buckets)
    program = lowered(layout=layout)
    assert "TIE:grads.1 REDUCE:grads.1 TIE:grads.0 REDUCE:grads.0 CLIP" in text(program.ranks[0])
    assert "TIE:grads.0 REDUCE:grads.0 TIE:grads.1 REDUCE:grads.1 CLIP" in text(program.ranks[1])
    verify(program, layout=layout, placement=zero1())


def test_split_backwards_lower_the_last_weight_gradient_only():
    row = [compute(op, 0, m) for op, m in (("F", 0), ("F", 1), ("B", 0), ("W", 0), ("B", 1), ("W", 1))]
    layout = StateLayout(((0, 1),), ((BucketInfo(0, (0, 1)),),))
    program = add_state(Program((tuple(row),), (0,), 2), layout, zero1())
    assert text(program.ranks[0]) == (
        "WEIGH:all F:stage0@0 F:stage0@1 B:stage0@0 W:stage0@0 B:stage0@1 W:unit1@1 W:unit0@1 REDUCE:grads.0 "
        "CLIP:all STEP:params.0 UNSHARD:params.0"
    )
    verify(program, layout=layout, placement=zero1())


def test_buckets_over_several_stages_of_a_coordinate_wait_for_the_last():
    program = add_communication(interleaved(2, 2, 2))
    buckets = ((BucketInfo(0, (0, 4)), BucketInfo(1, (5,))), (BucketInfo(0, (2, 3, 6, 7)),))
    layout = StateLayout(((0, 1), (2, 3), (4, 5), (6, 7)), buckets)
    program = add_state(program, layout, zero1())
    row = [str(a) for a in program.ranks[0]]
    assert row.index("REDUCE:grads.1") == row.index("BW:unit5@1") + 1
    assert row.index("REDUCE:grads.0") == row.index("BW:unit0@1") + 1
    verify(program, layout=layout, placement=zero1())


def test_a_coordinate_without_parameters_takes_part_in_the_norm():
    layout = StateLayout(((0,), (1,)), ((BucketInfo(0, (0,)),), ()))
    program = lowered(layout=layout)
    assert Action("CLIP", Subject("all")) in program.ranks[1]
    verify(program, layout=layout, placement=zero1())


def test_forward_only_programs_get_no_state():
    program = add_communication(schedules.forward_only(2, 3))
    assert add_state(program, TIED, zero1()) is program


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (StateLayout(((0,),), ((),)), "units of 1 stages and buckets of 1 coordinates"),
        (
            StateLayout(((0,), (1,)), ((BucketInfo(0, (1,)),), ())),
            r"coordinate 0 runs units \[0\].*index 0 and units \(1,\)",
        ),
        (StateLayout(((0,), (1,)), ((BucketInfo(3, (0,)),), ())), "has index 3"),
        (StateLayout(((0,), (1,)), ((BucketInfo(0, ()),), ())), r"units \(\)"),
        (
            StateLayout(
                ((0, 1), (2, 3, 4)),
                (
                    (BucketInfo(0, (0,), tied=(0, 2)), BucketInfo(1, (1,), tied=(1,))),
                    tuple(BucketInfo(k, (2 + k,), tied=(k,)) for k in range(3)),
                ),
            ),
            r"coordinates 0 and 1 would sum their common ties in the orders \[0, 2, 1\] and \[0, 1, 2\]",
        ),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, why):
    with pytest.raises(ProgramError, match=why):
        lowered(layout=layout)
