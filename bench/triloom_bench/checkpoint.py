"""Saving and loading the state of a training on one rank, against the disk's limit and three libraries.

What it moves: parameters and both moments of AdamW in fp32, ``--mib`` MiB in all; bandwidth = those bytes / seconds
until they are on the disk (every file and folder forced there: the libraries do not do that themselves, so it is done
and counted after them), or in the tensors of the training again.

The limit of writing: a loop of ``pwrite`` from one touched buffer, 1 MiB blocks past the page cache (O_DIRECT) into
preallocated space, with as many threads as were fastest in a trial; that of reading alike with ``preadv``. Loads are
from the disk: what a contender wrote is dropped from the page cache first. A save begins with the folder of the one
before removed, outside the time.

The stall of an asynchronous save is what the steps wait: the calls of ``Checkpoints`` from the one that begins a save
to the one that finds it done. ``steps with a save`` are whole steps while one is written, over the same number
without: on a machine whose cores all compute, the writer takes its share of them.

Run: ``python -m triloom_bench.checkpoint [--mib 1024] [--folder DIR] [--rounds 9]``
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from triloom.checkpoint import Checkpoints
from triloom.engine import Engine
from triloom.native import Pool
from triloom.optim import AdamW
from triloom.parallel.build import mean_loss

from . import harness
from .harness import MIN_ROUNDS, Pair

MIB = 1 << 20
WIDTH = 1024
STATES = 3
"""Parameters and two moments."""
THREADS = (1, 2, 4, 8)

Timed = Callable[[], float]
"""One block: seconds of what is measured."""


def make_engine(mib: int) -> Engine:
    """A stack of square matrices whose whole state has ``mib`` MiB (rounded to 12 MiB), trained on a tiny batch."""
    layers = max(1, round(mib * MIB / (STATES * 4 * WIDTH * WIDTH)))
    units = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)]
    return Engine(units, mean_loss(torch.nn.functional.mse_loss), optimizer=AdamW(lr=1e-6))


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """The same state as plain tensors, for the libraries."""
    out = {}
    for kind in ("params", "exp_avg", "exp_avg_sq"):
        out |= {f"{kind}/{name}": t for name, t in engine.full_state(kind).items()}
    return out


# ---------------------------------------------------------------- the disk


class Disk:
    """Plain loops of large blocks past the page cache."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._path = folder / "limit"
        self._size = nbytes // MIB * MIB
        self._buffer = mmap.mmap(-1, self._size)
        for at in range(0, self._size, mmap.PAGESIZE):
            self._buffer[at] = 1
        self.writers, self.readers = 1, 1

    def settle(self) -> None:
        """Find the number of threads that is fastest."""
        self.writers = min(THREADS, key=lambda n: min(self.write(n), self.write(n)))
        self.readers = min(THREADS, key=lambda n: min(self.read(n), self.read(n)))

    def write(self, threads: int | None = None) -> float:
        self._path.unlink(missing_ok=True)
        begin = time.perf_counter()
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(fd, 0, self._size)
        self._each(threads or self.writers, lambda at, part: os.pwrite(fd, part, at))
        os.fsync(fd)
        os.close(fd)
        return time.perf_counter() - begin

    def read(self, threads: int | None = None) -> float:
        begin = time.perf_counter()
        fd = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        self._each(threads or self.readers, lambda at, part: os.preadv(fd, [part], at))
        os.close(fd)
        return time.perf_counter() - begin

    def _each(self, threads: int, move: Callable[[int, memoryview], int]) -> None:
        blocks = iter(range(0, self._size, MIB))
        lock, view = threading.Lock(), memoryview(self._buffer)

        def work() -> None:
            while True:
                with lock:
                    at = next(blocks, None)
                if at is None:
                    return
                if move(at, view[at : at + MIB]) != MIB:
                    raise OSError("a short block")

        others = [threading.Thread(target=work) for _ in range(threads)]
        for t in others:
            t.start()
        for t in others:
            t.join()


def force(place: Path) -> None:
    """Everything below ``place`` to the disk."""
    for path in [*place.rglob("*"), place, place.parent]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def forget(place: Path) -> None:
    """Drop the files below ``place`` from the page cache."""
    for path in place.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


# ---------------------------------------------------------------- contenders


def saving(folder: Path, name: str, write: Callable[[Path], object]) -> Timed:
    """A library's save into a new folder, until it is on the disk."""

    def block() -> float:
        place = folder / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        begin = time.perf_counter()
        write(place)
        force(place)
        return time.perf_counter() - begin

    return block


def loading(folder: Path, name: str, read: Callable[[Path], object]) -> Timed:
    """A load of what ``saving`` of that name left, from the disk."""

    def block() -> float:
        forget(folder / name)
        begin = time.perf_counter()
        read(folder / name)
        return time.perf_counter() - begin

    return block


def ours(engine: Engine, folder: Path) -> Timed:
    def block() -> float:
        shutil.rmtree(folder / "triloom", ignore_errors=True)
        begin = time.perf_counter()
        engine.save(folder / "triloom")
        return time.perf_counter() - begin

    return block


class Asynchronous:
    """Saves under a running training; ``stall`` and ``steps`` are measured in the same block."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._engine = engine
        self._checkpoints = Checkpoints(engine, folder / "asynchronous", keep=1)
        self._batch = (torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))
        self.extra: list[float] = []
        """Share by which steps with a save took longer."""

    def stall(self) -> float:
        """Seconds that the calls of one save took, while the training went on."""
        shutil.rmtree(self._checkpoints.folder, ignore_errors=True)
        plain = [self._step()[0] for _ in range(3)]
        begin = time.perf_counter()
        self._checkpoints.save()
        first = calls = time.perf_counter() - begin
        steps = list[float]()
        while self._checkpoints.busy:
            seconds, waited = self._step()
            steps.append(seconds + waited)
            calls += waited
        usual = sorted(plain)[1]
        self.extra.append((first + sum(steps)) / (usual * len(steps)) - 1)
        return calls

    def _step(self) -> tuple[float, float]:
        begin = time.perf_counter()
        metrics = self._engine.step(*self._batch)
        between = time.perf_counter()
        self._checkpoints.after(metrics)
        return between - begin, time.perf_counter() - between


def contenders(engine: Engine, folder: Path, disk: Disk) -> tuple[dict[str, Timed], dict[str, Timed], Asynchronous]:
    """Writers, readers (of what the writers left), and the one in the background."""
    state = tensors(engine)
    background = Asynchronous(engine, folder)

    def put(found: Mapping[str, torch.Tensor]) -> None:
        for name, t in found.items():
            state[name].copy_(t)

    writers: dict[str, Timed] = {
        "disk": disk.write,
        "triloom": ours(engine, folder),
        "stall": background.stall,
        "safetensors": saving(folder, "safetensors", lambda p: save_file(state, str(p / "model.safetensors"))),
        "torch.save": saving(folder, "torch", lambda p: torch.save(state, p / "model.pt")),
        "DCP": saving(folder, "dcp", lambda p: dcp.save(state, checkpoint_id=str(p), no_dist=True)),
    }
    readers: dict[str, Timed] = {
        "disk": disk.read,
        "triloom": loading(folder, "triloom", engine.load),
        "safetensors": loading(folder, "safetensors", lambda p: put(load_file(str(p / "model.safetensors")))),
        "torch.load": loading(folder, "torch", lambda p: put(torch.load(p / "model.pt", weights_only=True))),
        "DCP": loading(folder, "dcp", lambda p: dcp.load(state, checkpoint_id=str(p), no_dist=True)),
    }
    return writers, readers, background


def interleave(blocks: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds by contender and round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for turn in range(-1, rounds):
        for name, run in blocks.items():
            seconds = run()
            if turn >= 0:
                times[name].append(seconds)
    return times


def measure(folder: Path, mib: int, rounds: int) -> list[harness.Result]:
    engine = make_engine(mib)
    engine.state.pool = Pool(torch.get_num_threads())
    engine.step(torch.zeros(1, WIDTH), torch.zeros(1, WIDTH))
    nbytes = sum(t.nbytes for t in tensors(engine).values())
    disk = Disk(folder, nbytes)
    disk.settle()
    writers, readers, background = contenders(engine, folder, disk)
    written, read = interleave(writers, rounds), interleave(readers, rounds)
    setup = {"bytes": nbytes, "threads_writing": disk.writers, "threads_reading": disk.readers}
    peers = ("safetensors", "torch.save", "DCP")
    pairs = [
        Pair("triloom", ("disk",), target=0.85),
        Pair("stall", ("triloom",), target=10.0),
        *(Pair("triloom", (peer,)) for peer in peers),
    ]
    extra = sorted(background.extra)[len(background.extra) // 2]
    note = f"steps with an asynchronous save took {1 + extra:.2f} times as long as without (median)"
    back = [Pair("triloom", ("disk",)), *(Pair("triloom", (peer,)) for peer in ("safetensors", "torch.load", "DCP"))]
    size = nbytes / 1e6
    return [
        harness.summarise(f"save {nbytes / MIB:.0f} MiB", "MB/s", size, written, pairs, setup=setup, notes=[note]),
        harness.summarise(f"load {nbytes / MIB:.0f} MiB", "MB/s", size, read, back, setup=setup),
    ]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".triloom-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--mib", type=int, help="size of the state; 1024, or a sixteenth of what is free if that is less"
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk that is measured")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="file for the results, beside the tables on standard output")
    options = parser.parse_args()
    if options.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {options.rounds}: a median needs at least {MIN_ROUNDS}")
    free = shutil.disk_usage(options.folder).free // MIB
    with scratch(options.folder) as folder:
        results = [r.as_json() for r in measure(folder, options.mib or min(1024, free // 16), options.rounds)]
    for row in results:
        print(harness.table(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
