"""Actions and programs: the text forms are inverses, and what is not a program is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triloom import schedules
from triloom.actions import COMPUTE, OPS, STATE, TRANSFER, Action, Program, Subject, parse_action, parse_program
from triloom.errors import ProgramError
from triloom.passes import add_communication

number = st.integers(0, 10**6)
PARTS = {
    **dict.fromkeys(COMPUTE, (st.sampled_from(("stage", "unit")), number, number, st.none())),
    **dict.fromkeys(TRANSFER, (st.sampled_from(("act", "grad")), number, number, number)),
    **dict.fromkeys(STATE, (st.sampled_from(("params", "grads", "optimizer")), number, st.none(), st.none())),
    **dict.fromkeys(
        ("FETCH", "EVICT"),
        (st.just("params"), number, st.none(), st.sampled_from(("pinned", "nvme", "disk2"))),
    ),
    **dict.fromkeys(("CLIP", "WEIGH"), (st.just("all"), st.none(), st.none(), st.none())),
}


@st.composite
def actions(draw):
    op = draw(st.sampled_from(OPS))
    kind, index, microbatch, peer = map(draw, PARTS[op])
    return Action(op, Subject(kind, index), microbatch, peer)


@given(actions())
def test_text_of_an_action_is_reversible_and_fits_a_csv_cell(action):
    text = str(action)
    assert parse_action(text) == action
    assert not set(text) & set(' ,\n"')


def test_every_operation_has_text_as_documented():
    said = (
        "F:stage2@5 BW:unit2@5 SEND:act2@5>3 RECV:act2@5<1 SEND:grad3@5>1 REDUCE:grads.0 CLIP:all FETCH:params.1<nvme"
    )
    assert [str(parse_action(t)) for t in said.split()] == said.split()
    assert parse_action("SEND:act2@5>3") == Action("SEND", Subject("act", 2), 5, 3)
    assert set(PARTS) == set(OPS)


@pytest.mark.parametrize(
    "text", ["", "F", "X:stage0@1", "F:stage.0@1", "F:stage0@01", "SEND:act0@1<2", "RECV:act0@1>²", "F:stage0@1,"]
)
def test_text_that_is_no_action_is_refused_by_name(text):
    with pytest.raises(ProgramError, match=r"is not"):
        parse_action(text)


@given(st.lists(st.lists(actions(), max_size=6), min_size=1, max_size=4), st.integers(1, 99))
def test_csv_of_any_program_is_reversible(rows, microbatches):
    program = Program(tuple(map(tuple, rows)), tuple(range(len(rows))), microbatches, "drawn-1")
    assert parse_program(program.to_csv()) == program


@pytest.mark.parametrize("name", schedules.NAMED)
def test_csv_of_schedules_is_reversible(name):
    program = add_communication(schedules.NAMED[name](3, 5))
    assert parse_program(program.to_csv()) == program


@pytest.mark.parametrize("text", ["", "F:stage0@0\n", "# x microbatches=1\n", "# x microbatches=1 stages=0//1\n"])
def test_a_file_without_its_header_is_refused(text):
    with pytest.raises(ProgramError, match="starts with"):
        parse_program(text)
