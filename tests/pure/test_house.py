"""Rules of the house that a machine can hold: who may read the environment, who may know whom, how long things get."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for top in ("runtime", "kernels", "bench") for path in (ROOT / top).rglob("*.py"))
BOOT = Path("runtime/triloom/boot.py")

LINES = 400
FUNCTION_LINES = 60

LAZY = {"mpi4py", "cupy", "triton", "matplotlib", "tokenizers", "wandb", "tensorboard"}
"""Optional packages: imported inside the function that needs them, never when a module of the runtime is."""


@pytest.fixture(params=FILES, ids=str)
def file(request: pytest.FixtureRequest) -> Path:
    return Path(request.param)


def parse(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text())


def imported(nodes: list[ast.stmt] | Iterator[ast.AST]) -> set[str]:
    """Top-level names of the packages imported by these nodes."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_only_boot_reads_the_environment(file: Path) -> None:
    readers = {"environ", "environb", "getenv", "putenv"}
    names = {node.attr for node in ast.walk(parse(file)) if isinstance(node, ast.Attribute)}
    names |= {alias.name for node in ast.walk(parse(file)) if isinstance(node, ast.ImportFrom) for alias in node.names}
    if file == BOOT:
        assert names & readers
    elif file.parts[0] != "bench":  # a measurement sets up its peers as their own documentation says
        assert not names & readers


def test_optional_packages_are_imported_where_they_are_used(file: Path) -> None:
    if file.parts[0] == "runtime":
        assert not imported(parse(file).body) & LAZY


def test_imports_point_down(file: Path) -> None:
    above = {"kernels": {"triloom", "triloom_bench"}, "runtime": {"triloom_bench"}, "bench": set()}[file.parts[0]]
    assert not imported(ast.walk(parse(file))) & above


def test_only_kernels_have_no_types(file: Path) -> None:
    """mypy is told to let functions without types pass in the kernels' package."""
    if file.parts[0] != "kernels":
        return
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef) and not any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            bare = [a.arg for a in given if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
            assert not bare, f"{node.name}: {bare}"
            assert node.returns is not None, node.name


def test_files_and_functions_can_be_read_without_scrolling(file: Path) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= LINES
    functions = [node for node in ast.walk(parse(file)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if (f.end_lineno or 0) - f.lineno >= FUNCTION_LINES}
    assert not long
