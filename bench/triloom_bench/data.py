"""What data costs: tokens/s of every kind of source, and a training step with and without it.

The first table cuts batches and nothing else, without a thread: inputs and targets as int64, in the order of an
epoch, against the same windows copied from a memory map in a bare loop (``astype`` of one slice a sample, stacked;
their places are known beforehand). The second trains: the same batch again and again, batches cut in place, batches
cut ahead by a thread. Files are small enough to stay in the page cache: no disk is measured.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from triloom import boot
from triloom.boot import World
from triloom.config.schema import DataConfig
from triloom.data import Feed, Samples, cut, find, open_found

from . import harness
from .harness import Block, Pair, Result
from .step import Ours, engine_of
from .work import SIZES, Size

TOKENS = 8 << 20
DOCUMENT = 1000
"""Tokens of a document in the Megatron files."""
SHARE = 0.01
"""Largest part of a step that data may cost."""
BARE = "bare copy of a memory map"


def write_files(folder: Path, vocab: int) -> None:
    """A text, a flat file and a Megatron pair of TOKENS tokens each."""
    ids = np.random.default_rng(5).integers(vocab, size=TOKENS).astype(np.uint16)
    ids.tofile(folder / "flat.bin")
    (folder / "text.txt").write_bytes(ids.astype(np.uint8).tobytes())
    ids.tofile(folder / "pair.bin")
    ends = np.arange(DOCUMENT, TOKENS + DOCUMENT, DOCUMENT).clip(max=TOKENS)
    starts = np.concatenate(([0], ends[:-1]))
    with (folder / "pair.idx").open("wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, len(ends), len(ends) + 1))
        for column, dtype in ((ends - starts, "<i4"), (2 * starts, "<i8"), (np.arange(len(ends) + 1), "<i8")):
            file.write(column.astype(dtype).tobytes())


def sources(folder: Path, size: Size) -> dict[str, Samples]:
    """Every kind of source, by what the table calls it."""
    flat, pair, text = (str(folder / name) for name in ("flat.bin", "pair.idx", "text.txt"))
    three = (flat, pair, text)
    configs = {
        "bytes of text": DataConfig(path=text),
        "flat uint16 file": DataConfig(path=flat),
        "Megatron pair": DataConfig(path=pair),
        "Megatron pair, eos put in": DataConfig(path=pair, eos=0),
        "three sources, joined": DataConfig(paths=three),
        "three sources, weighted": DataConfig(paths=three, weights=(0.5, 0.3, 0.2)),
    }
    return {
        name: cut(
            open_found(config, find(config), folder, None),
            seq=size.seq,
            seed=0,
            vocab=256,
            held_out=0.0,
            weights=config.weights,
        ).train
        for name, config in configs.items()
    }


def bare(folder: Path, samples: Samples, size: Size) -> Callable[[], object]:
    """The windows of a flat file, one after the other, by hand."""
    tokens = np.memmap(folder / "flat.bin", dtype=np.uint16, mode="r")
    starts = samples.locate(np.arange(1 << 16, dtype=np.int64)).start.tolist()
    at = 0

    def batch() -> object:
        nonlocal at
        mine = starts[at : at + size.batch]
        at = (at + size.batch) % (len(starts) - size.batch)
        x = np.stack([tokens[i : i + size.seq].astype(np.int64) for i in mine])
        y = np.stack([tokens[i + 1 : i + 1 + size.seq].astype(np.int64) for i in mine])
        return torch.from_numpy(x), torch.from_numpy(y)

    return batch


def repeated(work: Callable[[], object], count: int) -> Block:
    def block() -> None:
        for _ in range(count):
            work()

    return block


def cutting(folder: Path, size: Size, world: World, rounds: int, batches: int) -> Result:
    """Tokens/s of cutting batches of ``size``."""
    kinds = sources(folder, size)
    blocks = {BARE: repeated(bare(folder, kinds["flat uint16 file"], size), batches)}
    blocks |= {name: repeated(Feed(samples, size.batch).next, batches) for name, samples in kinds.items()}
    times = harness.interleave(world.group, blocks, rounds=rounds)
    return harness.summarise(
        f"cutting batches, {size.name}: {size.batch} x {size.seq}",
        "tokens/s",
        size.batch * size.seq * batches,
        times,
        [Pair(name, (BARE,)) for name in kinds],
        setup={"size": vars(size), "batches": batches, "tokens": TOKENS},
    )


def training(folder: Path, size: Size, world: World, rounds: int) -> Result:
    """Steps with one batch that is there, and with data."""
    samples = sources(folder, size)["three sources, weighted"]
    engine = engine_of(Size(**{**vars(size), "vocab": 256}), world, Ours())
    same = samples.take(0, size.batch)
    feeds = {"data cut in place": Feed(samples, size.batch), "data cut ahead": Feed(samples, size.batch, ahead=2)}
    blocks = {"no data: one batch, again and again": repeated(lambda: engine.step(*same), size.steps)}
    blocks |= {name: repeated(lambda f=feed: engine.step(*f.next()), size.steps) for name, feed in feeds.items()}  # type: ignore[misc]
    times = harness.interleave(world.group, blocks, rounds=rounds * size.repeat)
    for feed in feeds.values():
        feed.close()
    first = next(iter(blocks))
    return harness.summarise(
        f"training, {size.name}, {world.threads} threads",
        "tokens/s",
        size.batch * size.seq * size.steps,
        times,
        [Pair("data cut in place", (first,)), Pair("data cut ahead", (first,), 1 - SHARE)],
        setup={"size": vars(size), "threads": world.threads},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, default=400, help="batches of a block, where only data is cut")
    parser.add_argument("--json", type=Path, help="file for the results, beside the tables on standard output")
    options = parser.parse_args()
    rows = []
    with boot.init(threads=1) as world, tempfile.TemporaryDirectory() as temp:
        write_files(Path(temp), 256)
        for name in options.size:
            size = SIZES[name]
            loader = cutting(Path(temp), size, world, options.rounds, options.batches).as_json()
            steps = training(Path(temp), size, world, options.rounds).as_json()
            alone = next(iter(steps["contenders"].values()))["rate"]
            slowest = min(c["rate"] for who, c in loader["contenders"].items() if who != BARE)
            share = f"cutting takes {alone / slowest:.2%} of a step with the slowest source, no thread"
            loader["notes"].append(share)
            for row in (loader, steps):
                rows.append(row)
                print(harness.table(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
