"""Every generator through the engine on the Threads group: the schedule does not change a bit."""

from __future__ import annotations

from functools import cache, partial

import pytest

from generator_cases import Outcome, Run, same_bits, train
from triloom import schedules
from triloom.groups.threads import run_threads
from triloom.schedules import NAMED, Schedule, interleaved
from triloom.search import automatic
from triloom.simulate import Costs

GENERATORS: dict[str, Schedule] = {name: make for name, make in NAMED.items() if name != "forward"}


@cache
def one_f_one_b(run: Run) -> list[Outcome]:
    return run_threads(run.dp * run.pp * run.tp, lambda group: train(group, run, schedules.one_f_one_b))


def check(run: Run, schedule: Schedule) -> None:
    got = run_threads(run.dp * run.pp * run.tp, lambda group: train(group, run, schedule))
    for one, other in zip(got, one_f_one_b(run), strict=True):
        same_bits(one, other)


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("name", GENERATORS)
def test_same_bits_as_1f1b(name: str, pp: int) -> None:
    for microbatches in sorted({1, pp - 1, 7} - {0}) if pp > 1 else [3]:
        check(Run("llama", pp=pp, microbatches=microbatches), GENERATORS[name])


@pytest.mark.parametrize("name", GENERATORS)
def test_same_bits_on_all_axes(name: str) -> None:
    """Dropout, tensor and sequence parallelism, data parallelism with and without sharding."""
    check(Run("gpt2", dp=2, pp=2, tp=2), GENERATORS[name])
    check(Run("llama", dp=2, pp=3, sharded=False), GENERATORS[name])


@pytest.mark.parametrize("make", [interleaved, schedules.breadth_first])
def test_same_bits_with_more_stages_a_rank(make: Schedule) -> None:
    for v, pp in ((3, 3), (4, 2), (9, 1)):
        check(Run("llama", pp=pp, microbatches=4), partial(make, v=v))


def test_same_bits_with_a_program_from_the_search() -> None:
    costs = Costs(F=[1, 2, 1], B=[1, 1, 2], W=[1, 1, 1], comm=0.2)
    check(Run("llama", pp=3, microbatches=5), automatic(costs, memory=4, effort=50_000))
    check(Run("gpt2", pp=2, microbatches=4), automatic(Costs(comm=0.1), memory=2.5, effort=50_000))
