"""``python -m triloom_kernels.bench [OPERATION ...]``: time, bandwidth or operations a second, share of the ceiling.

On a GPU every operation of the table against torch as a user writes it, the same through torch.compile, and
Liger-Kernel, flash-attn and Apex where they are installed: contenders in turn, cache flushed, medians of ``--rounds``
calls. The ceilings are measured first: a copy of 1 GiB and a bf16 product. Without a GPU it says so and runs the eager
references alone, at small sizes. Results are written after each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Function, cases, grads_like
from .others import installed
from .report import plot, row_text
from .timing import Ceilings, Run, ceilings, interleaved

Rows = list[dict[str, Any]]
Times = dict[str, list[float]]


def contenders(case: Case, device: torch.device, notes: list[str]) -> dict[str, Function]:
    """Ours first; the name says what runs."""
    if device.type != "cuda":
        return {"eager": case.ours}
    found: dict[str, Function] = {"triloom": case.ours, **(case.named or {})}
    if case.theirs is not None:
        found |= {"torch": case.theirs, "torch.compile": torch.compile(case.theirs, dynamic=False)}
    others, missing = installed(case.op)
    notes += [line for line in missing if line not in notes]
    return found | others


def timed(
    case: Case, device: torch.device, rounds: int, notes: list[str]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """(direction, least work, seconds by contender) of a case; who fails is left out, with a note."""
    functions = contenders(case, device, notes)
    inputs, extra = case.inputs(device), case.extra(device)
    differentiated = bool(case.backward or case.both)
    leaves = [x.requires_grad_() for x in inputs] if differentiated else inputs
    for direction in ("forward", "backward", "both"):
        work = getattr(case, direction)
        if not work:
            continue
        runs: dict[str, Run] = {}
        for name, function in functions.items():
            try:
                runs[name] = _run(direction, function, leaves, extra)
                runs[name]()
            except Exception as error:  # a peer that does not take these inputs must not end the bench
                if name in ("triloom", "eager"):
                    raise
                notes.append(f"{case.op} {direction}: {name} is left out: {type(error).__name__}: {error}"[:300])
                runs.pop(name, None)
        yield direction, work, dict(interleaved(runs, device, rounds))


def _run(direction: str, function: Function, leaves: list[Tensor], extra: list[Any]) -> Callable[[], object]:
    if direction == "forward":
        return lambda: function(*leaves, *extra)
    if direction == "both":
        return lambda: torch.autograd.grad(function(*leaves, *extra), leaves)
    made = function(*leaves, *extra)
    outputs = [t for t in (made if isinstance(made, tuple) else (made,)) if t.requires_grad]
    grads = grads_like(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def rows(case: Case, device: torch.device, top: Ceilings | None, rounds: int, notes: list[str]) -> Rows:
    out = []
    for direction, work, times in timed(case, device, rounds, notes):
        medians = {name: statistics.median(t) for name, t in times.items()}
        ours = next(iter(medians))
        ceiling = None if top is None else (top.flops_per_s if case.flops else top.bytes_per_s)
        peers = {name: median for name, median in medians.items() if name != ours}
        out.append(
            {
                "op": case.op, "size": case.size, "direction": direction, "unit": "FLOP/s" if case.flops else "B/s",
                "seconds": medians, "rate": {name: work / median for name, median in medians.items()},
                "share_of_ceiling": None if ceiling is None else work / medians[ours] / ceiling,
                "faster_than": {name: median / medians[ours] for name, median in peers.items()},
                "spread": {name: [min(t), max(t)] for name, t in times.items()},
            }
        )  # fmt: skip
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="triloom_kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OPERATION", help="all if left out")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each contender, at least 7")
    parser.add_argument("--json", type=Path, help="file for the results, written after each case")
    parser.add_argument("--plot", type=Path, help=".svg or .png of the shares of the ceiling (needs matplotlib)")
    options = parser.parse_args()
    if options.rounds < 7:
        parser.error(f"--rounds {options.rounds}: a median needs at least 7")
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    known = list(dict.fromkeys(case.op for case in cases(torch.device("cpu"), small=True)))
    unknown = [op for op in options.ops if op not in known]
    if unknown:
        parser.error(f"unknown operation {', '.join(unknown)}; there are {', '.join(known)}")
    notes = [] if on_gpu else ["no GPU here: the eager references alone, on the CPU and at small sizes"]
    print(notes[0] if notes else torch.cuda.get_device_name(device), flush=True)
    top = ceilings(device, options.rounds) if on_gpu else None
    if top is not None:
        print(f"ceilings: copy {top.bytes_per_s / 1e12:.2f} TB/s, product {top.flops_per_s / 1e12:.0f} TFLOP/s")
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu", "torch": torch.__version__,
        "rounds": options.rounds, "ceilings": None if top is None else vars(top), "notes": notes, "rows": [],
    }  # fmt: skip
    for case in cases(device, small=not on_gpu):
        if options.ops and case.op not in options.ops:
            continue
        for row in rows(case, device, top, options.rounds, notes):
            result["rows"].append(row)
            print(row_text(row), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    for note in notes[not on_gpu :]:
        print(f"note: {note}")
    if options.plot and top is not None:
        plot(result, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
