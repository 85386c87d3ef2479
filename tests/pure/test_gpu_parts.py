"""Parts of ``make gpu``: what they run, within which limits, and what is left of them, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "tools" / "gpu.py"
GRACE = 10
"""Seconds that a command which was asked to end may take for it."""


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_parts", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return module


class Commands:
    """In place of ``watched``: notes commands, and writes what they would."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.limits, self.commands = code, list[float](), list[list[str]]()
        self.environments: list[dict[str, str] | None] = []
        self.left: list[list[str]] = []

    def __call__(self, command: list[str], limit: float, env: dict[str, str] | None = None) -> int:
        self.limits.append(limit)
        self.commands.append(command)
        self.environments.append(env)
        for word, following in zip(command, [*command[1:], ""], strict=True):
            if word.startswith("--junitxml="):
                Path(word.partition("=")[2]).parent.mkdir(exist_ok=True, parents=True)
                Path(word.partition("=")[2]).write_text('<t><testcase classname="a" name="b" time="1"/></t>')
            if word == "--json":
                self.left.append(sorted(path.name for path in Path(following).parent.iterdir()))
                Path(following).write_text('{"rows": [1, 2]}' if "kernels" in following else "[1]")
        return self.code


def run(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str, commands: Commands) -> dict[str, Any]:
    monkeypatch.setattr(gpu, "watched", commands)
    found: dict[str, Any] = gpu.PARTS[part]()
    assert sum(commands.limits) + GRACE * len(commands.limits) <= 480
    assert len(list(gpu.out().iterdir())) <= 7  # and gpu.json
    assert json.loads((gpu.out() / f"{part}.json").read_text()).items() <= found.items()
    return found


def test_kernels(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/bin/{name}" if "/" not in name else None)
    commands = Commands()
    found = run(gpu, monkeypatch, "kernels", commands)
    tests, memcheck, bench, plot = commands.commands
    assert {"tests/gpu/test_kernels_flats.py", "tests/gpu/test_kernels_norms.py"} <= set(tests)
    assert memcheck[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"] and sys.executable in memcheck
    assert commands.environments[1] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert bench[1:3] == ["-m", "triloom_kernels.bench"] and plot[-1] == bench[-1]
    assert commands.left == [["kernels.json"]]  # what the tests found was written before the bench began
    assert found["ok"] and found["bench"]["rows"] == 2 and found["memcheck"]["invalid"] == 0


def test_memory_errors_fail_even_if_cut_off(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: name)
    commands = Commands(124)

    def cut_off(command: list[str], limit: float, env: dict[str, str] | None = None) -> int:
        (gpu.out() / "memcheck.log").write_text(said)
        return commands(command, limit, env)

    monkeypatch.setattr(gpu, "watched", cut_off)
    said = "========= Invalid __global__ write of size 4 bytes\n========= at x\n"
    result = gpu.memcheck(["tests/gpu/test_kernels_norms.py"], 1)
    assert (result["ok"], result["invalid"], result["code"]) == (False, 1, 124)
    said = "========= COMPUTE-SANITIZER\n"
    assert gpu.memcheck(["tests/gpu/test_kernels_norms.py"], 1)["ok"]


def test_without_the_sanitizer_it_says_so(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.memcheck([], 1) == {"ok": True, "skipped": "compute-sanitizer is not installed"}
    assert "memory is not checked" in capsys.readouterr().err


def test_step(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands()
    found = run(gpu, monkeypatch, "step", commands)
    assert [command[3:5] for command in commands.commands] == [["--size", "125m"], ["--size", "1b"]]
    assert commands.left[1] == ["gpu_step_125m.json", "step.json"]
    assert found["ok"]


def test_a_failure_does_not_stop_the_rest(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = Commands(1)
    found = run(gpu, monkeypatch, "kernels", commands)
    assert not found["ok"] and len(commands.commands) >= 3


def test_a_bench_that_measured_nothing_is_a_failure(gpu: ModuleType) -> None:
    """The real command: here is no GPU, and a row is not made up."""
    found = gpu.figures("gpu_step_125m", "triloom_bench.gpu_step", ["--size", "125m"], 100)
    if found["ok"]:
        pytest.skip("there is a GPU")
    assert found == {"ok": False, "code": 0, "rows": 0}


def test_the_limit_ends_a_command_with_what_it_started(gpu: ModuleType, tmp_path: Path) -> None:
    late = tmp_path / "late"
    shell = f"(sleep 3; touch {late}) & sleep 30"
    begin = time.monotonic()
    assert gpu.watched(["sh", "-c", shell], 0.5) == 124
    assert time.monotonic() - begin < 20
    time.sleep(3)
    assert not late.exists()
    assert gpu.watched(["sh", "-c", "exit 7"], 60) == 7
