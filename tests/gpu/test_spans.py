"""Spans on a GPU: events on the stream, on the host's clock."""

from __future__ import annotations

import time

import pytest
import torch

from triloom.actions import Action, Subject
from triloom.spans import DeviceSpans, spans_on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

F = Action("F", Subject("stage", 0), 0)


def test_spans_are_the_devices_time_not_the_launches() -> None:
    device = torch.device("cuda")
    spans = spans_on(device)
    assert isinstance(spans, DeviceSpans)
    x = torch.randn(4096, 4096, device=device)
    x @ x
    torch.cuda.synchronize()
    for _ in range(2):
        before = time.perf_counter_ns()
        spans.begin(2)
        launched = time.perf_counter_ns()
        for count in (20, 40):
            for _ in range(count):
                x @ x
            spans.action(F, 0, 0)
        launched = time.perf_counter_ns() - launched
        rows = spans.rows()
        after = time.perf_counter_ns()
    one, two = (rows[:, 1] - rows[:, 0]).tolist()
    assert rows[1, 0] == rows[0, 1], "one after the other"
    assert two / one == pytest.approx(2, rel=0.3)
    assert one + two > launched, "the launches alone are faster"
    assert before <= int(rows[0, 0]) and int(rows[1, 1]) <= after + 1_000_000
