"""The kernels' own bench (``python -m triloom_kernels.bench``), its results as the other benches give theirs.

What it moves, its contenders and its ceilings: see there. On a GPU ours is held to be at or ahead of torch.compile and
Liger-Kernel. A ratio is one of medians; its bounds are the least and the largest that two calls could give, not paired
ones, because contenders are timed call by call.

Run: ``python -m triloom_bench kernels``; or by hand ``python -m triloom_bench.kernels [OPERATION ...] [--rounds 15]
[--json FILE] [--plot FILE.svg]``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from triloom_kernels.bench.report import SCALES

from .harness import Contender, Ratio, Result

TARGETS = {"torch.compile": 1.0, "liger": 1.0}


def as_result(row: Mapping[str, Any], whole: Mapping[str, Any]) -> Result:
    """A row of the kernels' bench. whole: what it stands in."""
    seconds, spread, (scale, unit) = row["seconds"], row["spread"], SCALES[row["unit"]]
    contenders = {who: Contender(t, *spread[who], row["rate"][who] / scale) for who, t in seconds.items()}
    ours = next(iter(seconds))
    ratios = [
        Ratio(ours, who, ratio, spread[who][0] / spread[ours][1], spread[who][1] / spread[ours][0], TARGETS.get(who))
        for who, ratio in row["faster_than"].items()
    ]
    share = row["share_of_ceiling"]
    notes = [] if share is None else [f"{share:.1%} of the ceiling"]
    about = {name: row[name] for name in ("op", "size", "direction", "share_of_ceiling")}
    machine = {name: whole[name] for name in ("device", "torch", "ceilings", "notes")}
    title = f"{row['op']} {row['direction']}, {row['size']}, {whole['device']}"
    return Result(title, unit, {**about, **machine}, whole["rounds"], contenders, ratios, notes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the results, beside the table on standard output")
    options, others = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="triloom-kernels-") as folder:
        found = Path(folder, "found.json")
        ended = subprocess.run([sys.executable, "-m", "triloom_kernels.bench", *others, "--json", str(found)])
        if options.json and found.exists():  # what was measured before a failure too
            whole = json.loads(found.read_text())
            options.json.write_text(json.dumps([as_result(row, whole).as_json() for row in whole["rows"]]))
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
