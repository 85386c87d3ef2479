"""Pictures and terminal grids of timelines: what is drawn where, and that both file formats can be read back."""

from __future__ import annotations

import re
import struct
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest

from triloom.commands.schedule import chart_of
from triloom.draw import LEFT, WIDTH, Bar, Chart, draw, terminal, tick_step
from triloom.errors import ConfigError
from triloom.picture import Picture, PictureUnavailableError, Rect, Text, save, to_svg
from triloom.schedules import gpipe, one_f_one_b
from triloom.simulate import Costs, simulate

SVG = "{http://www.w3.org/2000/svg}"


def chart(stages: int = 2, microbatches: int = 3) -> Chart:
    return chart_of(simulate(one_f_one_b(stages, microbatches), Costs(F=1, B=1, W=1)))


# ---------------------------------------------------------------- pictures


def test_every_action_is_a_bar_at_its_time_on_the_row_of_its_rank() -> None:
    timeline = simulate(one_f_one_b(3, 5), Costs(F=2, B=1.5, W=1, comm=0.25))
    picture = draw([chart_of(timeline)])
    bars = {r.tip.split(": ")[0]: r for r in picture.shapes if isinstance(r, Rect) and ": " in r.tip}
    assert len(bars) == 3 * 5 * 2
    scale = bars["F:stage0@0"].width / 2  # nearly: a bar leaves a little white
    rows = sorted({r.y for r in bars.values()})
    assert len(rows) == 3
    for rank, spans in enumerate(timeline.ranks):
        for span in spans:
            bar = bars[str(span.action)]
            assert bar.y == rows[rank]
            assert bar.x == pytest.approx(LEFT + span.begin * scale, rel=0.03)
            assert bar.width == pytest.approx((span.end - span.begin) * scale, rel=0.03)
    for y in rows:
        ordered = sorted((r.x, r.x + r.width) for r in bars.values() if r.y == y)
        assert all(one[1] < after[0] for one, after in pairwise(ordered)), "bars of a rank do not overlap"
    assert max(r.x + r.width for r in bars.values()) < WIDTH


def test_forward_backward_and_weight_gradients_have_colours_of_their_own_and_a_legend() -> None:
    bars = tuple(Bar(op, 0, k, k + 1) for k, op in enumerate(("F", "B", "W", "BW", "R", "wait", "transfer", "STEP")))
    picture = draw([Chart("all", (bars,), 8.0)])
    fills = {r.fill for r in picture.shapes if isinstance(r, Rect) and ": " in r.tip}
    assert len(fills) == 8
    said = {t.text for t in picture.shapes if isinstance(t, Text)}
    assert {"F forward", "B input gradient", "W weight gradient", "waiting on receive", "other actions"} <= said


def test_panels_share_one_time_scale_so_that_they_can_be_compared() -> None:
    timelines = [simulate(make(4, 8), Costs()) for make in (gpipe, one_f_one_b)]
    timelines.append(simulate(one_f_one_b(4, 2), Costs()))
    picture = draw([chart_of(t) for t in timelines])
    forwards = [r for r in picture.shapes if isinstance(r, Rect) and r.tip.startswith("F:stage0@0")]
    assert len(forwards) == 3
    assert len({(r.x, round(r.width, 6)) for r in forwards}) == 1


def test_numbers_fit_into_their_bars() -> None:
    picture = draw([chart_of(simulate(one_f_one_b(8, 32), Costs()))])
    bars = [r for r in picture.shapes if isinstance(r, Rect) and ": " in r.tip]
    numbers = [t for t in picture.shapes if isinstance(t, Text) and t.anchor == "middle" and t.text.isdigit()]
    inside = [
        (t, r) for t in numbers for r in bars if r.x < t.x < r.x + r.width and r.y < t.y < r.y + r.height
    ]  # the numbers of the axis are in none
    assert len(inside) == len(bars) == 8 * 32 * 2
    assert all(0.64 * t.size * len(t.text) <= r.width + 0.1 for t, r in inside)
    assert all(f"@{t.text}:" in r.tip for t, r in inside)


def test_hundreds_of_ranks_stay_on_a_page() -> None:
    picture = draw([chart_of(simulate(gpipe(256, 2), Costs()))])
    assert picture.height < 1600
    assert sum(isinstance(t, Text) and t.text.startswith("rank ") for t in picture.shapes) < 140


def test_the_svg_is_xml_that_says_what_was_drawn(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    picture = draw([Chart("<1f1b> & co", chart().rows, chart().end)])
    save(picture, path)
    root = ElementTree.parse(path).getroot()
    assert (root.tag, float(root.get("width") or 0)) == (f"{SVG}svg", picture.width)
    assert len(root.findall(f"{SVG}rect")) == 1 + sum(isinstance(s, Rect) for s in picture.shapes)
    assert "<1f1b> & co" in [e.text for e in root.iter(f"{SVG}text")]
    assert to_svg(picture) == to_svg(picture)


def test_the_png_has_the_pictures_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = draw([chart()])
    save(picture, tmp_path / "a.PNG")
    data = (tmp_path / "a.PNG").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (round(2 * picture.width), pytest.approx(2 * picture.height, abs=1))


def test_a_picture_that_cannot_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Picture(1, 1, ())
    with pytest.raises(ConfigError, match=r"a.pdf': a picture is written as .svg or .png"):
        save(empty, tmp_path / "a.pdf")
    with pytest.raises(ConfigError, match="the folder .*nowhere' does not exist"):
        save(empty, tmp_path / "nowhere" / "a.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ConfigError, match="folder.svg' cannot be written: Is a directory"):
        save(empty, tmp_path / "folder.svg")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PictureUnavailableError, match=r"a PNG needs matplotlib .* ends in .svg"):
        save(empty, tmp_path / "a.png")


@pytest.mark.parametrize("end", [1e-6, 0.7, 1.0, 13.9, 14.0, 15.0, 1832.7, 3e9])
def test_ticks_are_round_and_few(end: float) -> None:
    step = tick_step(end)
    assert 5 <= end / step <= 14 + 1e-6 or end / step == pytest.approx(14)
    assert re.fullmatch(r"[125]e[+-]\d\d", f"{step:.0e}")
    assert float(f"{step:.0e}") == pytest.approx(step)


# ---------------------------------------------------------------- terminal


def test_the_grid_is_the_papers_figure() -> None:
    assert terminal(chart(2, 3), 80).splitlines() == [
        "time   |0                  |10",
        "rank 0 F0F1. . B0==F2B1==. B2==",
        "rank 1 . F0B0==F1B1==F2B2==. .",
    ]


def test_a_long_grid_is_cut_into_blocks_that_lose_nothing() -> None:
    timeline = simulate(one_f_one_b(8, 32), Costs())
    text = terminal(chart_of(timeline), 100)
    assert max(map(len, text.splitlines())) <= 100
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert all(len(block) == 9 for block in blocks)
    for rank in range(8):
        row = "".join(block[1 + rank][7:].ljust(93) for block in blocks)
        assert re.findall(r"F(\d+)", row) == [str(m) for m in range(32)]
        assert re.findall(r"B(\d+)", row) == [str(m) for m in range(32)]


def test_later_stages_of_a_rank_are_small_letters_and_colours_are_for_terminals() -> None:
    bars = (Bar("F", 0, 0, 1), Bar("F", 0, 1, 2, chunk=1), Bar("BW", 0, 2, 4, chunk=1))
    both = Chart("two chunks", (bars,), 4.0)
    assert terminal(both, 80).splitlines()[1] == "rank 0 F0f0b0=="
    painted = terminal(both, 80, colour=True).splitlines()[1]
    assert "\x1b[" in painted
    assert re.sub(r"\x1b\[[\d;]*m", "", painted) == "rank 0 F0f0b0=="


def test_times_that_are_no_multiples_of_each_other_get_half_slots() -> None:
    bars = (Bar("F", 0, 0, 1), Bar("BW", 0, 1, 2.5))
    assert terminal(Chart("x", (bars,), 2.5), 80).splitlines()[1] == "rank 0 F0==B0===="[:17]


def test_extreme_costs_do_not_make_an_endless_grid() -> None:
    bars = (Bar("F", 0, 0, 1e-9), Bar("BW", 0, 1e-9, 1.0))
    text = terminal(Chart("x", (bars,), 1.0), 120)
    assert len(text) < 6000
