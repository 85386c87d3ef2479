"""Spans: recorded in place, aligned by clock offsets; the measured bubble taken apart, saved, and drawn again."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from triloom import cli
from triloom import spans as module
from triloom.actions import Action, Program, Subject, parse_program
from triloom.errors import ConfigError
from triloom.groups.base import Group
from triloom.groups.threads import run_threads
from triloom.measured import Measurement, Seat, Times, differences, measures, rank_table
from triloom.passes import add_communication
from triloom.schedules import Schedule, one_f_one_b, zb_h1
from triloom.simulate import Costs, simulate
from triloom.spans import DeviceSpans, Offsets, Spans, align, clock_offsets, gather_rows, spans_on
from triloom.trace import Step, Trace, load, save

F = Action("F", Subject("stage", 0), 0)
MS = 1_000_000

# ---------------------------------------------------------------- recording


def test_rows_are_what_was_recorded() -> None:
    spans = Spans()
    spans.begin(3)
    spans.action(F, 10, 20)
    spans.wait(31, 34)
    spans.wait(36, 38)
    spans.action(F, 30, 50)
    spans.action(F, 60, 70)
    assert spans.rows().tolist() == [[10, 20, 0, 0], [30, 50, 5, 38], [60, 70, 0, 0]]
    spans.begin(1)
    spans.action(F, 80, 90)
    assert spans.rows().tolist() == [[80, 90, 0, 0]], "a new list starts again"


def test_more_actions_than_announced_are_a_mistake_of_the_caller() -> None:
    spans = Spans()
    spans.begin(1)
    spans.action(F, 0, 1)
    with pytest.raises(IndexError):
        spans.action(F, 1, 2)


def test_recording_costs_microseconds() -> None:
    """Under 1% of actions of 0.2 ms, on a machine that does other things too: the fastest of ten tries."""
    spans, n, best = Spans(), 2000, float("inf")
    for _ in range(10):
        spans.begin(n)
        begin = time.perf_counter()
        for _ in range(n):
            at = time.perf_counter_ns()
            spans.action(F, at, time.perf_counter_ns())
        best = min(best, (time.perf_counter() - begin) / n)
    assert best < 2e-6


class FakeEvent:
    """A CUDA event of a stream on which time passes by hand (milliseconds)."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self, stream: object) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


def test_spans_of_a_gpu_follow_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    spans = DeviceSpans(torch.device("cuda", 0))
    for start in (100.0, 900.0):
        FakeEvent.now = start
        before = time.perf_counter_ns()
        spans.begin(2)
        FakeEvent.now += 2.0
        spans.action(F, 0, 0)
        FakeEvent.now += 1.5
        spans.wait(0, 0)
        FakeEvent.now += 3.0
        spans.action(F, 0, 0)
        rows = spans.rows()
        zero = int(rows[0, 0])
        assert before <= zero <= time.perf_counter_ns()
        assert (rows - torch.tensor([[zero, zero, 0, 0], [zero, zero, 0, zero]])).tolist() == [
            [0, 2 * MS, 0, 0],
            [2 * MS, 6.5 * MS, 1.5 * MS, 3.5 * MS],
        ]
    assert isinstance(spans_on(torch.device("cpu")), Spans)


def test_gathered_rows_are_padded_to_the_longest_list() -> None:
    def body(group: Group) -> list[list[list[int]]]:
        mine = torch.arange(4 * (group.rank + 1)).view(-1, 4) + 100 * group.rank
        return gather_rows(group, mine, 3).tolist()

    for got in run_threads(2, body):
        assert got[0] == [[0, 1, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert got[1] == [[100, 101, 102, 103], [104, 105, 106, 107], [0, 0, 0, 0]]


# ---------------------------------------------------------------- clocks


class Skewed:
    """A clock per thread that is ahead by a known time; counts up by what really passes."""

    def __init__(self, ahead: dict[int, int]) -> None:
        self.ahead = ahead
        self.rank: dict[int, int] = {}

    def perf_counter_ns(self) -> int:
        return time.perf_counter_ns() + self.ahead[self.rank[threading.get_ident()]]


def test_offsets_of_skewed_clocks_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Skewed({0: 0, 1: 5_000_000_000, 2: -7_000_000_000})
    monkeypatch.setattr(module, "time", clock)

    def body(group: Group) -> Offsets:
        clock.rank[threading.get_ident()] = group.rank
        return clock_offsets(group)

    found = run_threads(3, body)
    assert found[0] == found[1] == found[2]
    offsets = found[0]
    assert offsets.add_ns[0] == offsets.error_ns[0] == 0
    for rank, true in ((1, -5_000_000_000), (2, 7_000_000_000)):
        assert abs(offsets.add_ns[rank] - true) <= offsets.error_ns[rank]
        assert 0 < offsets.error_ns[rank] < 50_000_000


def test_alignment_adds_offsets_and_follows_drift() -> None:
    rows = torch.tensor([[[1000, 2000, 50, 1500], [0, 0, 0, 0]], [[1000, 2000, 0, 0], [9000, 9500, 0, 0]]])
    begin = Offsets(1000, (0, 100), (0, 1))
    assert align(rows, begin).tolist() == [
        [[1000, 2000, 50, 1500], [0, 0, 0, 0]],
        [[1100, 2100, 0, 0], [9100, 9600, 0, 0]],
    ]
    end = Offsets(11000, (0, 200), (0, 1))  # rank 1 falls behind by 1 in 100
    followed = align(rows, begin, end)
    assert followed[0].tolist() == rows[0].tolist()
    assert followed[1, 1, 0].item() == pytest.approx(9000 + 100 + 0.01 * 8100, abs=1)
    assert rows[1, 1, 0].item() == 9000, "the rows themselves stay"


# ---------------------------------------------------------------- the bubble


def played(program: Program, costs: Costs) -> Times:
    """Times of a program as if it had run exactly as simulated: an action begins when the one before is over, and
    waits inside for its tensor."""
    timeline = simulate(program, costs)
    m = Measurement(program, ((0,), (1,)), (Seat(0, 0), Seat(1, 0)))
    times = np.zeros((len(program.ranks), m.most, 4), dtype=np.int64)
    receiving = {(rank, row) for rank, row in m.receives[:2].T.tolist()}
    for rank, row in enumerate(timeline.ranks):
        free = 0
        for i, span in enumerate(row):
            begin, end = round(span.begin * MS), round(span.end * MS)
            waited = begin - free if (rank, i) in receiving else 0
            start = begin - waited
            times[rank, i] = [start, end, waited, begin if waited else 0]
            free = end
    return times


PROGRAM = add_communication(one_f_one_b(2, 4))
TWO = Measurement(PROGRAM, ((0,), (1,)), (Seat(0, 0), Seat(1, 0)))


@pytest.mark.parametrize("make", [one_f_one_b, zb_h1])
@pytest.mark.parametrize("comm", [0.0, 0.5])
def test_a_run_that_goes_as_simulated_has_the_simulated_bubble(make: Schedule, comm: float) -> None:
    costs = Costs(F=2.0, B=3.0, W=1.0, comm=comm)
    program = add_communication(make(2, 4))
    m = Measurement(program, ((0,), (1,)), TWO.seats)
    timeline, times = simulate(program, costs), played(program, costs)
    figures = m.figures(times)
    assert figures.ms == pytest.approx(timeline.makespan)
    assert figures.bubble == pytest.approx(timeline.bubble)
    assert figures.other == 0
    assert figures.idle + figures.receive + figures.transfer == pytest.approx(figures.bubble)
    assert (figures.transfer > 0) == (comm > 0)
    assert figures.receive > 0
    typical = measures(m, [times])
    assert typical.comm == pytest.approx(comm, abs=1e-5)
    expected = {"F": 2.0, "BW": 4.0} if make is one_f_one_b else {"F": 2.0, "B": 3.0, "W": 1.0}
    assert typical.computes == {op: pytest.approx((value, value)) for op, value in expected.items()}
    assert all(abs(d.ms) < 1e-3 for d in differences(m, times, typical) if "between" not in d.text)


def test_receive_ends_and_transfer_begins_when_the_tensor_is_sent() -> None:
    """Rank 1 waits from 0 to 9 for what rank 0 sends at 6."""
    program = parse_program("# x microbatches=1 stages=0/1\nF:stage0@0,SEND:act0@0>1\nRECV:act0@0<0,F:stage1@0\n")
    m = Measurement(program, ((0,), (1,)), TWO.seats)
    times = np.array([[[0, 6, 0, 0], [6, 7, 0, 0]], [[0, 0, 0, 0], [0, 12, 9, 9]]]) * MS
    figures = m.figures(times)
    assert figures.ms == 12
    assert figures.receive == pytest.approx(6 / 24)
    assert figures.transfer == pytest.approx(3 / 24)
    assert figures.bubble == pytest.approx(1 - (6 + 3) / 24)
    assert figures.other == 0, "the SEND is after the rank's last compute"
    assert figures.idle == pytest.approx((12 - 6) / 24)
    late = times.copy()
    late[0, 1] = [10 * MS, 11 * MS, 0, 0]  # posted after the tensor had arrived, says a clock that is off
    assert m.figures(late).transfer == 0
    assert rank_table(m, times) == [
        {"rank": 0, "busy": 6.0, "receive": 0.0, "transfer": 0.0, "rest": 6.0},
        {"rank": 1, "busy": 3.0, "receive": 6.0, "transfer": 3.0, "rest": 0.0},
    ]


def test_other_actions_count_from_the_first_compute_of_any_rank_to_the_last_of_their_own() -> None:
    program = parse_program("# x microbatches=1 stages=0\nWEIGH:all,F:stage0@0,WEIGH:all,BW:stage0@0,CLIP:all\n")
    m = Measurement(program, ((0,),), (Seat(0, 0), Seat(0, 1)))
    one = [[0, 40, 0, 0], [40, 50, 0, 0], [51, 53, 0, 0], [53, 60, 0, 0], [60, 99, 0, 0]]
    two = [[0, 41, 0, 0], [42, 50, 0, 0], [50, 50, 0, 0], [50, 55, 0, 0], [55, 99, 0, 0]]
    figures = m.figures(np.array([one, two]) * MS)
    assert figures.ms == 20
    assert figures.other == pytest.approx((2 + 1) / 40)
    assert figures.idle == pytest.approx((1 + 1 + 5) / 40)
    assert figures.bubble == pytest.approx(1 - (17 + 13) / 40)


def test_a_slow_action_and_a_gap_are_named() -> None:
    times = played(PROGRAM, Costs(F=2, B=2, W=2))
    typical = measures(TWO, [times])
    row = PROGRAM.ranks[1].index(Action("F", Subject("stage", 1), 2))
    times[1, row, 1] += 3 * MS
    times[1, row + 1 :, [0, 1]] += 8 * MS
    times[1, row + 1, 0] -= 5 * MS  # what came next, a RECV, took the time
    named = differences(TWO, times, typical, most=2)
    assert [round(d.ms) for d in named] == [5, 3]
    assert named[0].text == "rank 1 between F:stage1@2 and BW:stage1@2: RECV:act0@3<0 took 5.000 of it"
    assert named[1].text == "rank 1 F:stage1@2 took 5.000, the median is 2.000"


def test_a_tensor_that_comes_late_is_named() -> None:
    times = played(PROGRAM, Costs(F=2, B=2, W=2, comm=0.5))
    typical = measures(TWO, [times])
    row = PROGRAM.ranks[1].index(Action("F", Subject("stage", 1), 0))
    times[1, row, [1, 2, 3]] += 7 * MS
    times[1, row + 1 :, :2] += 7 * MS
    (late,) = differences(TWO, times, typical, most=1)
    assert late.ms == pytest.approx(7)
    assert late.text == "rank 1 F:stage1@0 waited 7.500 for a tensor on its way, simulated 0.500"


def test_units_of_one_stage_action_are_one_action_to_the_simulation() -> None:
    program = parse_program(
        "# x microbatches=1 stages=0/1\nF:stage0@0,SEND:act0@0>1,RECV:grad1@0<1,BW:unit1@0,BW:unit0@0\n"
        "RECV:act0@0<0,F:stage1@0,BW:unit2@0,SEND:grad1@0>0\n"
    )
    m = Measurement(program, ((0, 1), (2,)), TWO.seats)
    assert [str(a) for a in m.order.ranks[0]] == ["F:stage0@0", "BW:stage0@0"]
    assert m.wholes[0][1].rows == (3, 4)
    assert m.receives.T.tolist() == [[0, 3, 1, 3], [1, 1, 0, 1]], "the unit that runs first takes the gradient"


def test_pipelines_side_by_side_receive_from_their_own() -> None:
    m = Measurement(PROGRAM, ((0,), (1,)), (Seat(0, 0), Seat(0, 1), Seat(1, 0), Seat(1, 1)))
    assert {(r, s) for r, _, s, _ in m.receives.T.tolist()} == {(0, 2), (2, 0), (1, 3), (3, 1)}


# ---------------------------------------------------------------- the file and the command


def trace_of(times: Times, number: int = 7) -> Trace:
    return Trace(TWO, (Step(number, times, TWO.figures(times)),), "dp=1 x pp=2 x tp=1", (0.0, 2.5))


def test_a_timeline_loads_as_it_was_saved(tmp_path: Path) -> None:
    trace = trace_of(played(PROGRAM, Costs(F=1.234567, B=2, W=1, comm=0.3)))
    save(trace, tmp_path)
    for got in (load(tmp_path), load(tmp_path / "timeline.json")):
        assert got.measurement == trace.measurement
        assert (got.mesh, got.clock_error_us) == (trace.mesh, trace.clock_error_us)
        assert [s.number for s in got.steps] == [7]
        assert got.steps[0].figures == trace.steps[0].figures
        assert np.array_equal(got.steps[0].times, trace.steps[0].times)


def test_the_file_is_a_trace_of_complete_events_with_arrows_that_meet(tmp_path: Path) -> None:
    save(trace_of(played(PROGRAM, Costs(comm=0.25))), tmp_path)
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert sum(e["pid"] == 0 for e in slices) == sum(map(len, PROGRAM.ranks))
    assert {"wait", "transfer"} == {e["name"] for e in slices if e["pid"] == 1}
    assert all(e["dur"] >= 0 and e["ts"] >= 0 and isinstance(e["tid"], int) for e in slices)
    arrows = [[e for e in events if e["ph"] == ph] for ph in "sf"]
    assert len(arrows[0]) == len(arrows[1]) == 8
    assert {e["id"] for e in arrows[0]} == {e["id"] for e in arrows[1]}
    starts = {e["id"]: e["ts"] for e in arrows[0]}
    assert all(starts[e["id"]] <= e["ts"] for e in arrows[1])
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[0, 1] == "rank 1 (pp 1)"


def test_the_command_draws_simulated_and_measured_and_names_differences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = played(PROGRAM, Costs(F=2, B=2, W=2))
    times[0, :, :2] += times[0, :, :2] // 2  # rank 0 is slower than it would be
    save(trace_of(times), tmp_path)
    assert cli.main(["timeline", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "step 7" in said and "simulated" in said and "largest differences" in said
    svg = (tmp_path / "timeline.svg").read_text()
    assert ">simulated 1f1b</text>" in svg and ">measured, step 7</text>" in svg
    assert cli.main(["timeline", str(tmp_path), "--json", "--most", "3", "--out", str(tmp_path / "b.svg")]) == 0
    about = json.loads(capsys.readouterr().out)
    assert len(about["differences"]) == 3
    assert about["measured"]["ms"] == pytest.approx(TWO.figures(times).ms)
    assert [row["rank"] for row in about["ranks"]] == [0, 1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "takes one run directory, got nothing"),
        (["/no/such"], "'/no/such' cannot be read: No such file or directory"),
        (["RUN", "--step", "3"], "--step 3 is not in the timeline; it has 7"),
        (["RUN", "--replica", "1"], "--replica 1: the run has 1 pipelines"),
        (["RUN", "--out", "x.gif"], "a picture is written as .svg or .png"),
        (
            ["EMPTY"],
            "cannot be read: No such file or directory; give the folder of a run that had run.timeline above 0",
        ),
    ],
)
def test_refusals(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    save(trace_of(played(PROGRAM, Costs())), tmp_path)
    words = [{"RUN": str(tmp_path), "EMPTY": str(tmp_path / "empty")}.get(word, word) for word in words]
    assert cli.main(["timeline", *words]) == cli.REFUSED
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": []}', '{"triloom": {"version": 1}}'])
def test_a_file_that_is_no_timeline_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "timeline.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a timeline written by triloom train"):
        load(tmp_path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    save(trace_of(played(PROGRAM, Costs())), tmp_path)
    path = tmp_path / "timeline.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(ConfigError, match="has version 99, this triloom reads version 1"):
        load(tmp_path)
