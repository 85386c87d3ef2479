"""``python -m triloom_kernels.tune [TABLE ...]``: choose the options of the kernels on this GPU, offline.

Each entry of a table is judged at its largest sizes: the candidates of ``tune/candidates.py`` that compile, fit and
agree with eager torch are timed in turn, the cache flushed before each call (as ``triloom_kernels.bench`` times), and
the fastest by median becomes the entry, ``"measured": true``. The file is rewritten after each table, so
that a run that is cut off keeps what it found. Without names: all tables. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .. import tuning
from ..bench.timing import interleaved
from ..launching import architecture
from .search import default_tuner, tune_all
from .work import WORK, Extent


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="triloom_kernels.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(WORK)}; all if left out")
    parser.add_argument("--arch", type=int, help="architecture whose table to begin from; the device's if left out")
    parser.add_argument("--out", type=Path, help="file to write; the package's own of this architecture if left out")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each candidate, at least 7")
    options = parser.parse_args(words)
    if unknown := [name for name in options.tables if name not in WORK]:
        parser.error(f"unknown table {', '.join(unknown)}; there are {', '.join(WORK)}")
    if options.rounds < 7:
        parser.error(f"--rounds {options.rounds}: a median needs at least 7")
    if not torch.cuda.is_available():
        print("no GPU here: options are chosen by their times on one; nothing was changed", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    own = architecture(device)
    arch = tuning.nearest(own if options.arch is None else options.arch)
    if own != arch and options.out is None:
        parser.error(f"this GPU is of architecture {own}: name a file with --out, or its times become those of {arch}")
    path = options.out or tuning.FOLDER / f"sm_{arch}.json"
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: writing {path}", flush=True)
    extent = Extent(rows=8192, elements=1 << 26, heads=16, half=torch.bfloat16, device=device)
    tuner = default_tuner(extent, interleaved, options.rounds, lambda line: print(line, flush=True))
    tune_all(
        {op: list(entries) for op, entries in tuning.table(arch).items()}, options.tables or list(WORK), tuner, path
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
