"""What the executor adds to the torch calls of an action: units that do nothing, on one rank.

What it moves: nothing; it counts time per action. A pipeline of ``--stages`` stages of one unit each (``nn.Identity``
and a loss that is the sum), all on one rank, runs 1F1B with ``--micro`` microbatches: F and BW of every stage and
microbatch, or F, B and W (``split``). The bare contender makes the same torch calls in the same order: a fresh leaf
and the unit's forward for F, ``torch.autograd.grad`` for BW and B, nothing for W. Overhead of an action =
(executor - bare) / actions, from the paired rounds; ``spans`` is the executor with the recorder of a run.

Run: ``python -m triloom_bench.executor [--stages 4] [--micro 16] [--rounds 9] [--json FILE]``
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triloom.actions import Action, compute
from triloom.groups.solo import Solo
from triloom.parallel.cut import Boundary, boundary
from triloom.parallel.executor import Executor, Recorder, StepState, UnitRun
from triloom.parallel.weight_grads import UnitGrads
from triloom.parallel.wire import Wire
from triloom.scope import Scope
from triloom.spans import spans_on

from .harness import MIN_ROUNDS, interleave, summarise

TARGET_US = 15.0


class Sum(nn.Module):
    """The loss."""

    def forward(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), target


def order(stages: int, micro: int, split: bool) -> list[Action]:
    """1F1B of a pipeline whose stages share a rank: all of a microbatch's forwards, then its backwards."""
    backward = ("B", "W") if split else ("BW",)
    row = []
    for m in range(micro):
        row += [compute("F", s, m) for s in range(stages)]
        row += [compute(op, s, m) for s in reversed(range(stages)) for op in backward]
    return row


def bare(units: Sequence[nn.Module], row: Sequence[Action], x: Tensor, target: Tensor) -> Callable[[], None]:
    """The torch calls alone."""
    last, seed = len(units) - 1, torch.ones(())

    def run() -> None:
        values, grads, passes = dict[int, Tensor](), dict[int, Tensor](), dict[int, tuple[Tensor, Tensor]]()
        for op, (_, s), _, _ in row:
            if op == "F":
                leaf = (values.pop(s - 1) if s else x).detach().requires_grad_()
                out = units[s](leaf, target)[0] if s == last else units[s](leaf)
                passes[s], values[s] = (leaf, out), out.detach()
                grads[last] = seed
            elif op in ("B", "BW"):
                leaf, out = passes.pop(s)
                grad = grads.pop(s)
                (grads[s - 1],) = torch.autograd.grad(out, leaf, grad)

    return run


def executed(
    units: Sequence[nn.Module], row: Sequence[Action], x: Tensor, target: Tensor, record: Recorder | None = None
) -> Callable[[], None]:
    """The same through the executor."""
    last, micro = len(units) - 1, 1 + max(a.microbatch or 0 for a in row)
    runs = {u: UnitRun(u, m, [], UnitGrads({}), is_loss=u == last) for u, m in enumerate(units)}
    executor = Executor(
        stages=[range(u, u + 1) for u in runs], where=[0] * len(units), here=0, units=runs,
        wire=Wire(lambda peer, way: (Solo(), 0), x.device), scope=Scope(), handlers={}, ready=lambda u: None,
        record=record,
    )  # fmt: skip
    start = Boundary([x], boundary(x).spec, (True,))  # so that every unit has a backward
    signature = ((tuple(x.shape), x.dtype),)

    def run() -> None:
        state = StepState([start] * micro, [target] * micro, [signature] * micro, [0] * micro, 0, loss_scale=1.0)
        executor.run(row, state)

    return run


def measure(stages: int, micro: int, rounds: int, repeat: int, split: bool) -> dict[str, Any]:
    units = [*(nn.Identity() for _ in range(stages - 1)), Sum()]
    row = order(stages, micro, split)
    x, target = torch.ones(4), torch.ones(())
    sides = {
        "bare torch calls": bare(units, row, x, target),
        "executor": executed(units, row, x, target),
        "executor, spans": executed(units, row, x, target, spans_on(torch.device("cpu"))),
    }

    def block(run: Callable[[], None]) -> Callable[[], None]:
        def many() -> None:
            for _ in range(repeat):
                run()

        return many

    times = interleave(Solo(), {name: block(run) for name, run in sides.items()}, rounds=rounds, warmup=2)
    amount = len(row) * repeat
    title = f"{'F, B, W' if split else 'F, BW'} of {stages} stages, {micro} microbatches"
    setup = {"stages": stages, "micro": micro, "actions": len(row), "threads": torch.get_num_threads()}
    result = summarise(title, "actions/s", amount, times, [], setup=setup).as_json()
    over = {
        name: statistics.median(
            (t - b) / amount * 1e6 for t, b in zip(times[name], times["bare torch calls"], strict=True)
        )
        for name in ("executor", "executor, spans")
    }
    result["overhead_us"] = over
    result["target_us"] = TARGET_US
    met = "met" if over["executor"] < TARGET_US else "MISSED"
    result["notes"] = [f"{name}: {us:.1f} us an action beyond the bare torch calls" for name, us in over.items()]
    result["notes"].append(f"target under {TARGET_US:.0f} us: {met}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20, help="steps in a block")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(options.stages, options.micro, options.rounds, options.repeat, split) for split in (False, True)]
    if options.json:
        options.json.write_text(json.dumps(rows))
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
