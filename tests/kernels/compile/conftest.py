"""Triton reads TRITON_INTERPRET when a kernel is decorated, so these tests are a process of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.exit("tests/kernels/compile makes cubins: unset TRITON_INTERPRET", returncode=4)

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[3] / "build" / "triton"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-budget", action="store_true", help="take what the kernels need now as their budget")
