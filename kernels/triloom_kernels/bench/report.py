"""Results as lines and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCALES = {"B/s": (1e9, "GB/s"), "FLOP/s": (1e12, "TFLOP/s")}


def row_text(row: Mapping[str, Any]) -> str:
    """One line: ours, its share of the ceiling, and how many times faster than each other contender."""
    ours = next(iter(row["seconds"]))
    scale, unit = SCALES[row["unit"]]
    share = "" if row["share_of_ceiling"] is None else f"  {row['share_of_ceiling']:6.1%} of the ceiling"
    against = "".join(f"  {name} x{ratio:.2f}" for name, ratio in row["faster_than"].items())
    what = f"{row['op']:22} {row['direction']:9} {row['size']:28}"
    rate = f"{row['rate'][ours] / scale:9.1f} {unit}"
    return f"{what} {ours} {row['seconds'][ours] * 1e6:10.1f} us {rate}{share}{against}"


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Share of the ceiling of every contender, a group of bars a row. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["rate"]))
    figure, axes = plt.subplots(figsize=(10, 0.32 * len(rows) + 1.5))
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        shares = [_share(row, name, result["ceilings"]) for row in rows]
        axes.barh([k + i * height for k in range(len(rows))], shares, height=height, label=name)
    axes.set_yticks([k + 0.4 for k in range(len(rows))])
    axes.set_yticklabels([f"{row['op']} {row['direction']} {row['size']}" for row in rows], fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("share of the measured ceiling")
    axes.set_title(f"{result['device']}, torch {result['torch']}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _share(row: Mapping[str, Any], name: str, top: Mapping[str, float]) -> float:
    ceiling = top["bytes_per_s" if row["unit"] == "B/s" else "flops_per_s"]
    return float(row["rate"].get(name, 0.0)) / ceiling
