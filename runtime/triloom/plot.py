"""Loss curves as loss.svg and loss.png. Needs matplotlib (extra ``plot``), which is loaded on first use only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import TriloomError

Curve = Sequence[tuple[int, float]]
"""Points (step, loss)."""


class PlotUnavailableError(TriloomError):
    """matplotlib is not installed."""


def plot_losses(curves: Mapping[str, Curve], folder: Path, title: str, spread: Curve | None = None) -> list[Path]:
    """Write loss.svg and loss.png into ``folder``; returns their paths.

    spread: a second panel on a logarithmic scale, the difference between the curves.
    Raises PlotUnavailableError without matplotlib.
    """
    figure_class = _figure_class()
    spread = [(step, value) for step, value in spread or () if value > 0]
    figure = figure_class(figsize=(7.0, 5.5 if spread else 4.0), layout="constrained")
    heights = [3, 1] if spread else [1]
    panels = figure.subplots(len(heights), 1, squeeze=False, sharex=True, height_ratios=heights)
    loss = panels[0, 0]
    for style, (label, curve) in zip(_styles(len(curves)), curves.items(), strict=True):
        loss.plot([step for step, _ in curve], [value for _, value in curve], label=label, **style)
    loss.set_title(title)
    loss.set_ylabel("loss (nats per token)")
    loss.legend(frameon=False)
    if spread:
        panels[1, 0].plot([step for step, _ in spread], [value for _, value in spread], color="0.3", linewidth=1)
        panels[1, 0].set_ylabel("difference")
        panels[1, 0].set_yscale("log")
    panels[-1, 0].set_xlabel("step")
    for panel in panels[:, 0]:
        panel.grid(alpha=0.3)
    paths = [folder / "loss.svg", folder / "loss.png"]
    for path in paths:
        figure.savefig(path, dpi=120)
    return paths


def _styles(count: int) -> list[dict[str, Any]]:
    """Later curves thinner and dashed, so that curves on top of each other can all be seen."""
    return [{"linewidth": 3.0 if i < count - 1 else 1.2, "linestyle": "-" if not i else "--"} for i in range(count)]


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlotUnavailableError(
            "no loss plot: matplotlib is not installed (pip install 'triloom[plot]'); metrics.jsonl has the numbers"
        ) from None
    return Figure
