"""Every figure of a report: its texts lie within it and apart from one another; its SVG and PNG."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from engine.report.figures.theme import (
    COLOR,
    NARROW,
    PALETTE,
    WIDE,
    Figure,
    inlined,
    note,
    place,
    sheet,
    svg,
    tag,
    themed,
    write_png,
)
from engine.report.page import FIGURES, Kind
from engine.report.run import Run, read_run
from tests.made_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "full"
    make_run(folder, members=40, failed={7: "killed", 9: "killed"}, pruned=(13, 15))
    return read_run(folder)


def texts(figure: Figure) -> list[tuple[str, Any]]:
    """What is written, and its box in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    hidden = set()  # ticks beyond the ends of an axis, or of one that is not drawn
    for axes in figure.axes:
        for way, (low, high), labels in (
            (0, sorted(axes.get_xlim()), axes.get_xticklabels()),
            (1, sorted(axes.get_ylim()), axes.get_yticklabels()),
        ):
            drawn = axes.axison
            hidden |= {t for t in labels if not drawn or not low <= t.get_position()[way] <= high}
    renderer = canvas.get_renderer()
    found = [t for t in figure.findobj(Text) if t not in hidden]
    return [
        (t.get_text(), t.get_window_extent(renderer))
        for t in found
        if isinstance(t, Text) and t.get_visible() and t.get_text()
    ]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("kind", FIGURES, ids=[kind.key for kind in FIGURES])
def test_texts_lie_within_the_figure_and_apart(run: Run, kind: Kind[Any], width: int) -> None:
    figure = kind.draw(kind.data(run), width)
    shown = texts(figure)
    assert figure.bbox.width == width
    for text, box in shown:
        assert box.x0 >= -2 and box.x1 <= width + 2, text
        assert box.y0 >= -2 and box.y1 <= figure.bbox.height + 2, text
    for (one, a), (other, b) in combinations(shown, 2):
        across, down = (
            min(a.x1, b.x1) - max(a.x0, b.x0),
            min(a.y1, b.y1) - max(a.y0, b.y0),
        )  # boxes are a little taller than letters
        assert across < 1 or down < 4, (one, other)


@themed
def made() -> Figure:
    figure = sheet(200, 100)
    axes = place(figure, 20, 10, 160, 70)
    (line,) = axes.plot([0, 1], [0, 1], color=COLOR["accent"])
    (bar,) = axes.barh(0.5, 1, color=COLOR["on-high"])
    tag(line, "<a> & 'b'", key="k:1")
    tag(bar, "bar")
    note(figure, 0, 95, "<hi> $x$: #123456", "ink")
    return figure


def test_svg_is_one_well_formed_picture_with_an_alternative() -> None:
    text = svg(made(), label='a "label" & <more>')
    root = ElementTree.fromstring(text)
    assert (root.attrib["width"], root.attrib["height"]) == ("200", "100")
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == 'a "label" & <more>'
    inside = [e.text for e in root.iter() if e.tag.endswith(("title", "text"))]
    assert "<a> & 'b'" in inside and "bar" in inside and "<hi> $x$: #123456" in inside
    assert [e.attrib["data-k"] for e in root.iter() if "data-k" in e.attrib] == ["k:1"]
    assert text == svg(made(), label='a "label" & <more>')


def test_inside_a_page_colours_are_variables() -> None:
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)
    text = inlined(svg(made(), label="x"), name="wide")
    assert text.startswith('<svg class="wide" viewBox="0 0 200 100" role="img" aria-label="x"')
    assert "var(--accent)" in text and "var(--on-high)" in text and "var(--ink)" in text
    assert re.findall(r"#[0-9a-f]{6}\b", text) == ["#123456"] and "font-family" not in text
    ElementTree.fromstring(text.replace("xlink:", ""))


def test_png(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_png(made(), tmp_path / f"{name}.png", title="what it shows")
    one = (tmp_path / "a.png").read_bytes()
    assert one == (tmp_path / "b.png").read_bytes()
    assert one.startswith(b"\x89PNG") and b"what it shows" in one
    assert int.from_bytes(one[16:20], "big") == 2 * (200 + 2 * 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]
