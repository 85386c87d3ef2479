"""What is installed, what a wheel ships, and that importing triloom costs and changes nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import triloom

ROOT = Path(__file__).resolve().parents[2]

IMPORT = """
import json, os, signal, sys, threading, time
import torch
def state():
    return {
        "threads": threading.active_count(), "tasks": len(os.listdir("/proc/self/task")), "env": dict(os.environ),
        "hooks": [repr(sys.excepthook), repr(threading.excepthook)], "path": list(sys.path), "cwd": os.getcwd(),
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), int(torch.initial_seed())],
        "signals": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "fds": os.listdir("/proc/self/fd"),
    }
before, modules, begin = state(), set(sys.modules), time.process_time()
import triloom
seconds = time.process_time() - begin
light = sorted(set(sys.modules) - modules)
import triloom.boot, triloom.errors, triloom.mesh, triloom.scope
print(json.dumps({
    "before": before, "after": state(), "seconds": seconds, "light": light,
    "mpi": [m for m in sys.modules if m.startswith("mpi4py")], "cuda": torch.cuda.is_initialized(),
}))
"""


def test_import_is_light_and_changes_nothing() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(ended.stdout)
    assert ended.stderr == ""
    assert told["after"] == told["before"]
    assert told["mpi"] == [] and not told["cuda"]
    assert told["light"] == ["triloom"]
    assert told["seconds"] < 0.05  # of processor time: wall time would measure what else the machine does


@pytest.mark.parametrize("name", triloom.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(triloom, name) is not None
    assert name in dir(triloom)


def test_type_checkers_see_the_same_names_from_the_same_modules() -> None:
    tree = ast.parse(Path(triloom.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    static = {alias.asname: f".{node.module}" for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert static == {name: f".{module}" for name, module in triloom._MODULE.items()}


def test_unknown_names_are_attribute_errors() -> None:
    assert not hasattr(triloom, "Engin")
    with pytest.raises(AttributeError, match=r"module 'triloom' has no attribute 'Engin'; it has .*Engine"):
        triloom.Engin  # noqa: B018


def test_metadata() -> None:
    installed = importlib.metadata.metadata("triloom")
    assert installed["Requires-Python"] == ">=3.11"
    assert installed["Version"] == triloom.__version__
    extras = {"bench", "mpi", "cuda12", "cuda13", "data", "kernels", "log", "plot", "dev"}
    assert set(installed.get_all("Provides-Extra") or ()) == extras
    required = [line for line in installed.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert sorted(line.partition(">")[0] for line in required) == ["numpy", "torch"]
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="triloom")
    assert callable(command.load())


def setup_py(folder: Path, *commands: str) -> Path:
    """Run setup.py with its outputs in ``folder``; objects that `make setup` compiled are used again."""
    egg = ("egg_info", "--egg-base", str(folder))
    command = [sys.executable, "setup.py", "-q", *egg, *commands, "--dist-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300)
    (made,) = [path for path in folder.iterdir() if path.suffix in {".whl", ".gz"}]
    return made


def sources(package: str, root: str) -> set[str]:
    """Everything of a package that has to be installed, as paths inside a wheel."""
    kept = {".py", ".pyi", ".toml", ".typed", ".json"}
    found = (ROOT / root / package).rglob("*")
    return {str(path.relative_to(ROOT / root)) for path in found if path.suffix in kept}


def test_wheel_holds_the_packages_the_extension_and_the_types(tmp_path: Path) -> None:
    build = ("build", "--build-lib", str(tmp_path / "lib"), "bdist_wheel", "--bdist-dir", str(tmp_path / "bdist"))
    with zipfile.ZipFile(setup_py(tmp_path, *build)) as wheel:
        names = set(wheel.namelist())
    shipped = {name for name in names if ".dist-info" not in name}
    wanted = sources("triloom", "runtime") | sources("triloom_kernels", "kernels") | sources("triloom_bench", "bench")
    natives = {name for name in shipped if name.endswith(".so")}
    assert shipped - natives == wanted
    assert [name.partition(".")[0] for name in natives] == ["triloom/_C"]
    assert {"triloom/py.typed", "triloom/_C.pyi", "triloom/boot.py"} <= shipped
    assert any(name.endswith("LICENSE") for name in names)


def test_source_distribution_can_be_built_from(tmp_path: Path) -> None:
    with tarfile.open(setup_py(tmp_path, "sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.is_file()}
    assert native | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "runtime/triloom/_C.pyi"} <= names
