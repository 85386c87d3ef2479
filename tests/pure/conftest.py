"""Ranks are threads here: one torch thread each, or the ranks' thread pools fight for the cores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nccl_fake import Fake, build


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nccl_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for libnccl.so.2, compiled once."""
    return build(tmp_path_factory.mktemp("nccl"))


@pytest.fixture
def fake(nccl_library: Path) -> Iterator[Fake]:
    """The stand-in, with nothing scripted and nothing called."""
    it = Fake(nccl_library)
    it.c.fake_reset()
    yield it
    it.c.fake_reset()
