"""The verifier: every class of refusal that does not depend on lanes."""

import pytest

from program_edits import LAYOUT, after, before, check, drop, edit, split, swap, turn, whole
from triloom import schedules
from triloom.actions import COMPUTE, Program, parse_action
from triloom.errors import ConfigError, ProgramError
from triloom.passes import BucketInfo, StateLayout, add_communication, add_state
from triloom.placement import zero0, zero1
from triloom.verify import StageBytes, inside, state_footprint, verify

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
    "STEP with a microbatch": (0, turn("STEP:params.1", "STEP:params.1@0"), "STEP of params has no microbatch"),
    "one REDUCE by microbatch": (0, turn("REDUCE:grads.1", "REDUCE:grads.1@0"), "RESHARD:grads.1@0 is missing"),
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
