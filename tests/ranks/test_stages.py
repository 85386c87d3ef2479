"""Under mpirun: what the verifier accepts runs; shapes, pytrees and skips between stages are those of one process."""

from __future__ import annotations

import pytest

from harness import draw, ship
from mutations import mutated
from triloom.actions import Program
from triloom.errors import ProgramError
from triloom.verify import verify


def accepted(program: Program) -> bool:
    try:
        verify(program)
    except ProgramError:
        return False
    return True


def programs(ranks: int) -> list[str]:
    drawn = (p for p in draw(mutated(), 300) if len(p.ranks) == ranks and accepted(p))
    return list(dict.fromkeys(p.to_csv() for p in drawn))


MODELS = {
    2: (("lengths", "zb_h1"), ("data", "1f1b"), ("kinds", "interleaved")),
    3: (("skips", "zb_h1"), ("skips", "interleaved"), ("lengths", "1f1b")),
}


@pytest.mark.parametrize("ranks", MODELS)
def test_accepted_mutants_run_and_models_with_awkward_stages_equal_one_process(ranks: int) -> None:
    texts = programs(ranks)
    assert len(texts) >= 20
    cases = [{"program": text} for text in texts[:30]]
    cases += [{"name": name, "schedule": schedule} for name, schedule in MODELS[ranks]]
    for per_rank in ship(ranks, "tests/ranks/cases_stages.py:run", cases):
        assert all(losses == per_rank[0] for losses in per_rank)
