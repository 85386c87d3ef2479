"""A program whose rank 1 leaves in a given way while the others wait for it: ``python failing.py HOW``."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

import torch

import triloom


def note() -> None:
    """Tell the test when it happens."""
    print(f"HAPPENS {time.time()}", flush=True)


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        note()
        raise ValueError("broken inside backward")


def in_main() -> None:
    note()
    raise ValueError("broken in main")


def in_thread() -> None:
    def work() -> None:
        note()
        raise ValueError("broken in a worker")

    threading.Thread(target=work, name="loader").start()
    time.sleep(60)


def in_backward() -> None:
    Breaks.apply(torch.ones(2, requires_grad=True)).sum().backward()


def interrupted() -> None:
    note()
    raise KeyboardInterrupt


def exits() -> None:
    note()
    sys.exit(7)


def killed() -> None:
    note()
    os.kill(os.getpid(), 9)


def returns() -> None:
    """Nothing goes wrong."""


HOW = {
    "main": in_main,
    "thread": in_thread,
    "backward": in_backward,
    "interrupt": interrupted,
    "exit": exits,
    "kill": killed,
    "clean": returns,
}

if __name__ == "__main__":
    how = sys.argv[1]
    if how == "unclosed":  # the three-line script whose author forgot `with`
        world = triloom.init(deadline=60)
        world.group.barrier().wait()
        if world.rank == 1:
            note()
            sys.exit(0)
        world.group.barrier().wait()
    with triloom.init(deadline=60) as world:
        world.group.barrier().wait()
        if world.rank == 1:
            HOW[how]()
        world.group.barrier().wait()
