"""The fake NCCL library (fake_nccl.c), and streams for it: a NCCL group without a GPU, ranks as threads."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from triloom._C import Nccl
from triloom.groups.base import Group
from triloom.groups.nccl_group import NCCLGroup
from triloom.groups.nccl_world import nccl_group
from triloom.groups.threads import run_threads

T = TypeVar("T")
SOURCE = Path(__file__).with_name("fake_nccl.c")


def build(folder: Path, *flags: str) -> Path:
    """Compile the fake with the C compiler; returns the library."""
    path = folder / "libnccl.so.2"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-pthread", *flags, str(SOURCE), "-o", str(path)], check=True)
    return path


class Fake:
    """The library as triloom sees it (``nccl``), and the test's own hold on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nccl = Nccl(str(path))
        self.c = ctypes.CDLL(str(path))
        self.c.fake_stream.restype = ctypes.c_void_p
        self.c.fake_mark.restype = ctypes.c_long
        self.c.fake_called.restype = ctypes.c_char_p
        self.c.fake_config.restype = ctypes.POINTER(ctypes.c_char * 48)
        self.devices = itertools.count()

    def script(self, function: str, result: int, times: int = 1) -> None:
        self.c.fake_script(function.encode(), result, times)

    def states(self, polls: int, then: int = 0) -> None:
        self.c.fake_states(polls, then)

    def break_comm(self, handle: int, error: int) -> None:
        self.c.fake_break(ctypes.c_void_p(handle), error)

    def called(self) -> list[str]:
        return str(self.c.fake_called().decode()).split()

    def config(self) -> bytes:
        return bytes(self.c.fake_config().contents)

    def streams(self) -> FakeStreams:
        return FakeStreams(self, f"device {next(self.devices)}")

    def run(self, n: int, body: Callable[[NCCLGroup], T], *, deadline: float = 60.0, **options: Any) -> list[T]:
        """``body(group)`` on n ranks as threads; the group is closed after it."""

        def rank(control: Group) -> T:
            group = nccl_group(control, self.streams(), library=self.nccl, beat=0.05, **options)
            try:
                return body(group)
            finally:
                group.close()

        return run_threads(n, rank, deadline=deadline)


class FakeStreams:
    """A stream of the fake: the host is the current stream, so ordering it after a mark blocks the host."""

    def __init__(self, fake: Fake, device_name: str) -> None:
        self.device = torch.device("cpu")
        self.capture = False
        self.watched = 0
        self.orders = 0
        self._fake, self._name = fake, device_name
        self.address = int(fake.c.fake_stream())

    def identity(self) -> str:
        return self._name

    def enter(self) -> None:
        return None

    def scope(self) -> AbstractContextManager[Any]:
        self._wait(self.mark())
        return nullcontext()

    def mark(self) -> int:
        return int(self._fake.c.fake_mark(ctypes.c_void_p(self.address)))

    def reached(self, mark: int) -> bool:
        assert not self.capture, "a capture was asked for an event"
        return bool(self._fake.c.fake_reached(ctypes.c_void_p(self.address), ctypes.c_long(mark)))

    def order(self, mark: int) -> None:
        self.orders += 1
        self._wait(mark)

    def _wait(self, mark: int) -> None:
        self._fake.c.fake_wait(ctypes.c_void_p(self.address), ctypes.c_long(mark))

    def capturing(self) -> bool:
        return self.capture

    def watching(self) -> None:
        self.watched += 1

    def fork(self) -> FakeStreams:
        return FakeStreams(self._fake, self._name)
