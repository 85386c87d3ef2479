"""A picture as a list of shapes, written as SVG (no packages needed) or PNG (through matplotlib).

Both writers draw the same list, so the two files show the same. Coordinates are pixels, y points down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from .errors import ConfigError, TriloomError

FONT = "DejaVu Sans, Verdana, Helvetica, Arial, sans-serif"
DIGIT = 0.636
"""Width of a digit of the font, in units of its size."""


class PictureUnavailableError(TriloomError):
    """matplotlib is not installed."""


class Rect(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    fill: str
    tip: str = ""
    """Shown by a browser where the pointer rests."""


class Line(NamedTuple):
    x1: float
    y1: float
    x2: float
    y2: float
    stroke: str
    width: float = 1.0


class Text(NamedTuple):
    x: float
    y: float
    """The baseline."""
    text: str
    size: float
    fill: str = "#222222"
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False


Shape: TypeAlias = Rect | Line | Text


@dataclass(frozen=True)
class Picture:
    """Shapes in the order they are painted, on white."""

    width: float
    height: float
    shapes: tuple[Shape, ...]


# ---------------------------------------------------------------- SVG


def to_svg(picture: Picture) -> str:
    """The picture as a text of SVG 1.1."""
    w, h = _n(picture.width), _n(picture.height)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}" font-family="{FONT}">'
    )
    body = (_SVG[type(shape)](shape) for shape in picture.shapes)
    return "\n".join([head, f'<rect width="{w}" height="{h}" fill="#ffffff"/>', *body, "</svg>"]) + "\n"


def _svg_rect(r: Rect) -> str:
    place = f'<rect x="{_n(r.x)}" y="{_n(r.y)}" width="{_n(r.width)}" height="{_n(r.height)}" fill="{r.fill}"'
    return f"{place}><title>{escape(r.tip)}</title></rect>" if r.tip else f"{place}/>"


def _svg_line(e: Line) -> str:
    return (
        f'<line x1="{_n(e.x1)}" y1="{_n(e.y1)}" x2="{_n(e.x2)}" y2="{_n(e.y2)}" stroke="{e.stroke}" '
        f'stroke-width="{_n(e.width)}"/>'
    )


def _svg_text(t: Text) -> str:
    anchor = "" if t.anchor == "start" else f' text-anchor="{t.anchor}"'
    weight = ' font-weight="bold"' if t.bold else ""
    place = f'<text x="{_n(t.x)}" y="{_n(t.y)}" font-size="{_n(t.size)}" fill="{t.fill}"{anchor}{weight}>'
    return f"{place}{escape(t.text)}</text>"


_SVG: dict[type, Callable[[Any], str]] = {Rect: _svg_rect, Line: _svg_line, Text: _svg_text}


def _n(value: float) -> str:
    """Hundredths of a pixel, without trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


# ---------------------------------------------------------------- PNG


def save_png(picture: Picture, path: Path, scale: float = 2.0) -> None:
    """Write a PNG of ``scale`` times the picture's size. Raises PictureUnavailableError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PictureUnavailableError(
            f"{str(path)!r} cannot be written: a PNG needs matplotlib (pip install 'triloom[plot]'), an SVG needs "
            "nothing; give a name that ends in .svg"
        ) from None
    figure = Figure(figsize=(picture.width / 72, picture.height / 72), dpi=72 * scale, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, picture.width)
    axes.set_ylim(picture.height, 0)
    for shape in picture.shapes:
        _PAINT[type(shape)](axes, shape)
    figure.savefig(path)


def _paint_rect(axes: Any, r: Rect) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((r.x, r.y), r.width, r.height, facecolor=r.fill, linewidth=0))


def _paint_line(axes: Any, e: Line) -> None:
    axes.plot([e.x1, e.x2], [e.y1, e.y2], color=e.stroke, linewidth=e.width, solid_capstyle="butt")


_ALIGN = {"start": "left", "middle": "center", "end": "right"}


def _paint_text(axes: Any, t: Text) -> None:
    axes.text(
        t.x, t.y, t.text.replace("$", r"\$"), fontsize=t.size, color=t.fill, ha=_ALIGN[t.anchor], va="baseline",
        weight="bold" if t.bold else "normal", family="DejaVu Sans",
    )  # fmt: skip


_PAINT: dict[type, Callable[[Any, Any], None]] = {Rect: _paint_rect, Line: _paint_line, Text: _paint_text}


# ---------------------------------------------------------------- files


def check_name(path: Path) -> None:
    """Raise ConfigError for a file name that says no format that can be written, or a folder that does not exist."""
    if path.suffix.lower() not in _SAVE:
        raise ConfigError(f"{str(path)!r}: a picture is written as {' or '.join(_SAVE)}; give a name that ends so")
    if not path.parent.is_dir():
        raise ConfigError(f"{str(path)!r} cannot be written: the folder {str(path.parent)!r} does not exist")


def save(picture: Picture, path: Path) -> None:
    """Write an SVG or a PNG, by the suffix. Raises ConfigError for another one or a folder that does not exist."""
    check_name(path)
    try:
        _SAVE[path.suffix.lower()](picture, path)
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be written: {error.strerror}; give a file in a folder that you may write to"
        ) from None


def _save_svg(picture: Picture, path: Path) -> None:
    path.write_text(to_svg(picture), encoding="utf-8")


_SAVE: dict[str, Callable[[Picture, Path], None]] = {".svg": _save_svg, ".png": save_png}
