"""The simulator: hand-computed timelines, the three bubbles, transfers, state actions, and how it scales."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial

import pytest

from triloom.actions import Program, parse_action, parse_program
from triloom.errors import ConfigError, ProgramError
from triloom.passes import BucketInfo, StateLayout, add_communication, add_recompute, add_state
from triloom.placement import zero1, zero3
from triloom.schedules import NAMED, forward_only, gpipe, interleaved, one_f_one_b, zb_h1, zb_v
from triloom.simulate import Costs, simulate


def times(timeline, rank):
    return {str(s.action): (s.begin, s.end) for s in timeline.ranks[rank]}


def test_two_ranks_by_hand():
    """1F1B of two microbatches: F 2, B and W 1 and 2, a hop 0.5."""
    timeline = simulate(one_f_one_b(2, 2), Costs(F=2, B=1, W=2, comm=0.5))
    assert times(timeline, 0) == {
        "F:stage0@0": (0, 2), "F:stage0@1": (2, 4), "BW:stage0@0": (8, 11), "BW:stage0@1": (13, 16),
    }  # fmt: skip
    assert times(timeline, 1) == {
        "F:stage1@0": (2.5, 4.5), "BW:stage1@0": (4.5, 7.5), "F:stage1@1": (7.5, 9.5), "BW:stage1@1": (9.5, 12.5),
    }  # fmt: skip
    assert (timeline.makespan, timeline.busy, timeline.ideal) == (16, (10, 10), 10)
    assert timeline.spans == (16, 10)
    assert timeline.bubble == pytest.approx(1 - 20 / 32)
    assert timeline.bubble_span == pytest.approx(6 / 16)
    assert timeline.bubble_ideal == pytest.approx(6 / 10)
    assert timeline.peak == (2, 1)


def test_split_backward_sends_its_gradient_before_w():
    program = Program(
        (tuple(map(parse_action, ("F:stage0@0", "BW:stage0@0"))),
         tuple(map(parse_action, ("F:stage1@0", "B:stage1@0", "W:stage1@0")))), (0, 1), 1,
    )  # fmt: skip
    timeline = simulate(program, Costs(F=1, B=2, W=4, BW=7))
    assert times(timeline, 0)["BW:stage0@0"] == (4, 11)
    assert times(timeline, 1)["W:stage1@0"] == (4, 8)


def test_costs_by_stage_rank_and_share():
    per_stage = simulate(gpipe(2, 1), Costs(F=[1, 5], B=[2, 3], W=[0, 4]))
    assert per_stage.makespan == 1 + 5 + 7 + 2
    slow = simulate(gpipe(2, 1), Costs(rank=[1, 3]))
    assert slow.makespan == 1 + 3 + 6 + 2
    share = simulate(interleaved(2, 2, 2), Costs(F=1, B=1, W=1))
    assert share.busy == (6, 6) and share.ranks[0][0].end == 0.5
    assert share.peak == (2, 1.5)


def test_two_sizes_of_memory():
    """Held from F to B and from B to W: the row F F B B W W of one rank, in words."""
    row = "F:stage0@0 F:stage0@1 B:stage0@0 B:stage0@1 W:stage0@0 W:stage0@1"
    program = Program((tuple(map(parse_action, row.split())),), (0,), 2)
    assert simulate(program, Costs(held=10, deferred=4)).peak == (20,)
    assert simulate(program, Costs(held=10, deferred=16)).peak == (32,)
    assert simulate(program, Costs(held=[10])).peak == (20,)
    assert simulate(forward_only(2, 3), Costs()).peak == (0, 0)


LINKS = (
    Costs(comm=0.3),
    Costs(boundary=1.0, bandwidth=0.7),
    Costs(F=2, W=0.5, comm=0.1, boundary=1.0, bandwidth=2.0),
)


@pytest.mark.parametrize("name", NAMED)
def test_added_transfers_change_nothing_unless_they_cost_the_rank(name):
    """Implied and explicit transfers agree: latency, bandwidth with a queue, and both."""
    for p, m in ((1, 2), (2, 3), (3, 5), (4, 9)):
        plain = NAMED[name](p, m)
        for costs in (
            Costs(comm=0.3),
            Costs(boundary=1.0, bandwidth=0.7),
            Costs(F=2, W=0.5, comm=0.1, boundary=1.0, bandwidth=2.0),
        ):
            implied, explicit = simulate(plain, costs), simulate(add_communication(plain), costs)
            assert explicit.makespan == implied.makespan
            assert (explicit.busy, explicit.peak) == (implied.busy, implied.peak)
            computes = [[s for s in row if s.action.op not in ("SEND", "RECV")] for row in explicit.ranks]
            assert computes == [list(row) for row in implied.ranks]
            assert sum(map(len, explicit.lanes)) == sum(a.op == "SEND" for r in explicit.program.ranks for a in r)


def test_transfers_queue_on_a_link_and_direction():
    """Two activations of 3 s each leave at 1 and 2: the second arrives at 1 + 3 + 3; the other direction is free."""
    timeline = simulate(add_communication(gpipe(2, 2)), Costs(boundary=6.0, bandwidth=2.0))
    sends = {str(s.action): (s.begin, s.end) for row in timeline.lanes for s in row}
    assert sends["SEND:act0@0>1"] == (1, 4)
    assert sends["SEND:act0@1>1"] == (4, 7)
    assert sends["SEND:grad1@0>0"] == (10, 13)


def test_links_can_differ():
    hop = {(0, 1): 0.1, (1, 2): 5.0, (2, 1): 1.0, (1, 0): 0.0}
    timeline = simulate(gpipe(3, 1), Costs(comm=lambda a, b: hop[a, b]))
    assert timeline.makespan == pytest.approx(9 + 6.1)


def test_blocking_sends_hold_the_sender():
    timeline = simulate(gpipe(2, 2), Costs(comm=2.0, blocking=True))
    assert times(timeline, 0)["SEND:act0@0>1"] == (1, 3)
    assert times(timeline, 0)["F:stage0@1"] == (3, 4)
    free = simulate(gpipe(2, 2), Costs(comm=2.0))
    assert timeline.makespan > free.makespan and timeline.busy == free.busy


def test_own_time_of_a_transfer_does_not_overlap():
    """Half a second at each post: rank 0 posts its receive of the gradient before it computes, then sends."""
    timeline = simulate(gpipe(2, 1), Costs(overhead=0.5))
    when = times(timeline, 0)
    assert (when["RECV:grad1@0<1"], when["F:stage0@0"], when["SEND:act0@0>1"]) == ((0, 0.5), (0.5, 1.5), (1.5, 2))
    assert times(timeline, 1)["F:stage1@0"] == (2, 3)
    assert timeline.busy == (3, 3)


def test_rendezvous_waits_for_the_receive():
    rows = (
        "F:stage0@0 SEND:act0@0>1 F:stage0@1 SEND:act0@1>1",
        "RECV:act0@0<0 F:stage1@0 RECV:act0@1<0 F:stage1@1",
    )
    program = Program(tuple(tuple(map(parse_action, r.split())) for r in rows), (0, 1), 2)
    costs = Costs(F=[1.0, 4.0], comm=1.0)
    assert times(simulate(program, costs), 1)["F:stage1@1"] == (6, 10)
    late = simulate(program, replace(costs, rendezvous=True))
    assert times(late, 1)["F:stage1@1"] == (7, 11)
    assert [(s.begin, s.end) for s in late.lanes[0]] == [(1, 2), (6, 7)]
    both = simulate(program, replace(costs, rendezvous=True, blocking=True))
    assert times(both, 0)["SEND:act0@1>1"] == (3, 7)


def layout(p):
    """Two units a stage, a bucket each."""
    return StateLayout(
        tuple((2 * s, 2 * s + 1) for s in range(p)),
        tuple((BucketInfo(0, (2 * s + 1,)), BucketInfo(1, (2 * s,))) for s in range(p)),
    )


def test_state_actions_of_one_rank_by_hand():
    program = add_state(add_communication(one_f_one_b(1, 1)), layout(1), zero1())
    state = {"WEIGH": 1.0, "REDUCE": 5.0, "CLIP": 2.0, "STEP": 1.0, "UNSHARD": 3.0}
    timeline = simulate(program, Costs(F=4, B=1, W=1, state=state, units={("BW", 1): 6.0}), layout=layout(1))
    when = times(timeline, 0)
    assert when["WEIGH:all"] == (0, 1)
    assert when["BW:unit1@0"] == (5, 11) and when["BW:unit0@0"] == (11, 12)
    assert [(str(s.action), s.begin, s.end) for s in timeline.lanes[0]] == [
        ("REDUCE:grads.0", 11, 16), ("REDUCE:grads.1", 16, 21),
        ("UNSHARD:params.0", 24, 27), ("UNSHARD:params.1", 27, 30),
    ]  # fmt: skip
    assert when["CLIP:all"] == (21, 23)
    assert when["STEP:params.0"] == (23, 24) and when["STEP:params.1"] == (24, 25)
    assert timeline.makespan == 30


def test_computes_wait_for_the_parameters_they_use():
    """ZeRO-3 without prefetch: every unit waits for its gather; with it, the next gather runs under the unit."""
    state = {"UNSHARD": 3.0}
    for prefetch, ends in ((0, [4.0, 8.0]), (1, [4.0, 7.0])):
        placement = zero3().with_(prefetch=prefetch, keep=False)
        program = add_state(add_communication(one_f_one_b(1, 1)), layout(1), placement)
        timeline = simulate(program, Costs(F=2, B=2, W=2, state=state), layout=layout(1))
        assert [s.end for s in timeline.ranks[0] if s.action.op == "F"] == ends
        assert timeline.busy == (6,)


def test_recompute_keeps_less_from_f_to_r():
    program = add_recompute(one_f_one_b(3, 5))
    timeline = simulate(program, Costs(held=10.0, kept=1.0))
    assert timeline.peak == (12, 11, 10)
    fused = simulate(one_f_one_b(3, 5), Costs(BW=3.0)).makespan
    assert timeline.makespan == fused - 2  # R runs while the gradient is on its way over two hops


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_clip_waits_for_all_ranks_and_units_change_nothing_else(name):
    plain = NAMED[name](3, 4)
    program = add_state(add_communication(plain), layout(3), zero1())
    timeline = simulate(program, Costs(state={"CLIP": 0.5}), layout=layout(3))
    clips = [(s.begin, s.end) for row in timeline.ranks for s in row if s.action.op == "CLIP"]
    computed = simulate(plain)
    assert clips == [pytest.approx((computed.makespan, computed.makespan + 0.5))] * 3
    assert timeline.peak == computed.peak


@pytest.mark.parametrize("name", NAMED)
def test_every_action_has_its_span_in_order(name):
    for p, m in itertools.product((1, 3, 4), (1, 4, 7)):
        timeline = simulate(add_communication(NAMED[name](p, m)), Costs(comm=0.25))
        for row, spans, busy, end in zip(
            timeline.program.ranks, timeline.ranks, timeline.busy, timeline.end, strict=True
        ):
            assert tuple(s.action for s in spans) == row
            assert all(a.end <= b.begin for a, b in itertools.pairwise(spans))
            assert sum(s.end - s.begin for s in spans) == pytest.approx(busy) and end <= timeline.makespan
        assert 0 <= timeline.bubble < 1 and 0 <= timeline.bubble_span < 1
        assert timeline.figures()["bubble_ideal"] == timeline.bubble_ideal


def test_what_cannot_run_is_refused_with_the_grid():
    text = "# stuck microbatches=1 stages=0/1\nBW:stage0@0,F:stage0@0\nF:stage1@0,BW:stage1@0\n"
    with pytest.raises(ProgramError, match=r"(?s)rank 0 before step 0 BW:stage0@0, rank 1 before step 0.*>> 0 BW"):
        simulate(parse_program(text))


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"F": -1.0}, "F has -1"),
        ({"W": [1.0, float("nan")]}, "W has nan"),
        ({"state": {"JUMP": 1.0}}, "JUMP"),
        ({"B": [1.0, 2.0, 3.0]}, "3 numbers for 2 stages"),
        ({"rank": [1.0]}, "1 factors for 2"),
    ],
)
def test_costs_that_do_not_fit_are_refused(costs, message):
    with pytest.raises(ConfigError, match=message):
        simulate(gpipe(2, 2), Costs(**costs))


def test_unit_actions_need_a_layout():
    program = add_state(add_communication(gpipe(2, 2)), layout(2), zero1())
    with pytest.raises(ProgramError, match=r"needs a layout"):
        simulate(program)


def seconds(run):
    best = float("inf")
    for _ in range(3):
        begin = time.process_time()
        run()
        best = min(best, time.process_time() - begin)
    return best


def test_cost_is_linear_in_the_actions():
    """p = 64, m = 256 well under a second; eight times the ranks and half the microbatches: four times that."""
    assert seconds(lambda: simulate(one_f_one_b(64, 256))) < 1.0
    for make in (zb_h1, zb_v):
        small, large = make(16, 64), make(64, 64)
        one, four = seconds(partial(simulate, small)), seconds(partial(simulate, large))
        assert four < 12 * one  # four times the actions; caches and noise may treble that, no square would pass
