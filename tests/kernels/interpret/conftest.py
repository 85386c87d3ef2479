"""Triton reads TRITON_INTERPRET when a kernel is decorated, so these tests are a process of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("tests/kernels/interpret runs kernels in Triton's interpreter: set TRITON_INTERPRET=1", returncode=4)


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
