"""The look of every figure: colours that follow the page's theme, plots placed in CSS pixels, SVG and PNG.

Figures are drawn in the light theme's colours. Inside a page each colour becomes a CSS variable, so that one SVG serves
light and dark. A point is a CSS pixel; x and y count from the top left corner.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes as Axes  # also for who draws with this module's functions alone
from matplotlib.figure import Figure as Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

RAMP_LIGHT = (
    "#eff2f3 #e4edee #d9e8e9 #cde3e4 #c2dedf #b3d7d9 #a3cfd2 #93c8cc #83c0c6 #6dadbb #579bb1 "
    "#4089a6 #27779b #246e96 #226591 #1f5d8c #1d5487 #1b4777 #193b67 #162f58 #132449"
).split()
RAMP_DARK = (
    "#1f262d #202c35 #20313d #203745 #1f3d4d #204456 #214c5e #215367 #215b70 #25667b #297285 "
    "#2e7e90 #328a9b #4699a3 #58a9aa #6ab8b1 #7cc8b8 #9ad4bd #b7e0c1 #d3ebc5 #eef7c9"
).split()
RAMP = tuple(zip(RAMP_LIGHT, RAMP_DARK, strict=True))
"""Colours of weights from 0 to 1, on light and on dark ground."""
TURN = 12
"""First level of the ramp whose letters are in ``on-high``: there the contrast of both themes turns."""
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e6e9ec"),
    "muted": ("#626b75", "#98a2ad"),
    "rule": ("#dfe3e6", "#2c343c"),
    "surface": ("#ffffff", "#14181c"),
    "on-low": ("#1b1f25", "#eef1f3"),
    "on-high": ("#fffffe", "#0b1014"),
    "accent": ("#2a7ca3", "#5ab3c4"),
    "best": ("#0b7a4b", "#5fd39a"),
    "random": ("#c2571a", "#f0a06a"),
    "untrained": ("#6d7178", "#a3a9b1"),
    "failed": ("#b3261e", "#f2877f"),
    "grey": ("#5f6670", "#a9b0b8"),
    "flow": ("#c45a1c", "#f2a36d"),
    "audio": ("#0f7f78", "#4fcabf"),
    "task0": ("#72777f", "#9aa0a8"),
    "task1": ("#96660a", "#e0b050"),
    "task2": ("#0e7f77", "#4ec9be"),
    "task3": ("#1f64ad", "#78b4f0"),
    "task4": ("#8a4fb0", "#c79be6"),
    "task5": ("#b83a6b", "#f08fb4"),
    "task6": ("#c5591b", "#f3a46e"),
    "task7": ("#4c7d1f", "#9fcb6c"),
    **{f"q{i}": pair for i, pair in enumerate(RAMP)},
}
"""Every colour that a figure may use, on light and on dark ground; no two are alike on light ground."""
FONT = 'Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
WIDE, NARROW = 820, 350
"""Widths in CSS pixels of a figure on a desktop and on a phone."""
COLOR = {name: light for name, (light, _) in PALETTE.items()}
"""What figures are drawn in."""
VARIABLE = {light: f"var(--{name})" for name, light in COLOR.items()}
MARGIN = 16
"""White space around a PNG file's figure, in pixels."""

themed = matplotlib.rc_context(
    {
        "figure.dpi": 72,
        "figure.facecolor": COLOR["surface"],
        "font.size": 11,
        "text.color": COLOR["ink"],
        "text.parse_math": False,
        "axes.facecolor": "none",
        "axes.labelcolor": COLOR["muted"],
        "axes.titlelocation": "left",
        "axes.titlesize": 12,
        "axes.titleweight": "bold",
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.spines.bottom": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": COLOR["rule"],
        "grid.linewidth": 1,
        "lines.dashed_pattern": (3, 3),
        "lines.scale_dashes": False,
        "patch.linewidth": 0,
        "xtick.color": COLOR["muted"],
        "xtick.major.size": 4,
        "xtick.major.width": 1,
        "ytick.color": COLOR["muted"],
        "ytick.major.size": 0,
        "ytick.major.pad": 7,
        "legend.frameon": False,
        "legend.labelcolor": COLOR["muted"],
        "legend.borderpad": 0,
        "legend.borderaxespad": 0,
        "legend.handletextpad": 0.5,
        "legend.handlelength": 0.9,
        "legend.columnspacing": 1.2,
        "svg.fonttype": "none",
    }
)
"""Decorates every function that draws a figure."""


def is_wide(width: float) -> bool:
    """Whether a figure of this width is laid out for a desktop."""
    return width > (WIDE + NARROW) / 2


def shade(weight: float) -> tuple[str, str]:
    """The ramp's colour of a weight in [0, 1], and that of letters on it."""
    level = round(min(max(weight, 0.0), 1.0) * (len(RAMP) - 1))
    return COLOR[f"q{level}"], COLOR["on-high" if level >= TURN else "on-low"]


def sheet(width: float, height: float) -> Figure:
    """An empty figure of a size in pixels."""
    return Figure(figsize=(width / 72, height / 72))


def place(
    figure: Figure, left: float, top: float, width: float, height: float, **settings: Any
) -> Axes:
    """A plot whose box lies there, in pixels; ``settings`` are what ``Axes.set`` takes."""
    across, down = figure.bbox.width, figure.bbox.height
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    axes: Axes = figure.add_axes(box)
    axes.set(**settings)
    return axes


def note(figure: Figure, x: float, y: float, text: str, color: str = "muted", **style: Any) -> None:
    """A line of text whose middle is at height y."""
    across, down = figure.bbox.width, figure.bbox.height
    style = {"va": "center_baseline", "color": COLOR[color], **style}
    figure.text(x / across, 1 - y / down, text, **style)


def beside(
    axes: Axes,
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    *,
    color: str = "muted",
    units: tuple[str, str] = ("data", "data"),
    **style: Any,
) -> None:
    """A line of text, some pixels from a point of a plot; ``units`` are matplotlib's of the point's x and y."""
    style = {"color": COLOR[color], "va": "center_baseline", "annotation_clip": False, **style}
    axes.annotate(text, at, offset, units, "offset points", **style)


def dots(
    axes: Axes, points: Iterable[tuple[float, float]], *, color: str, size: float, **style: Any
) -> None:
    """A disc a point, or with ``ring=True`` a circle; with ``many=True`` small and letting others shine through."""
    ring, many = style.pop("ring", False), style.pop("many", False)
    look = {"marker": "o", "ls": "", "color": COLOR[color], "ms": 3 if many else size}
    look |= {"mew": 1.4, "mfc": "none"} if ring else {"mew": 0}
    look |= {"alpha": 0.55} if many else {}
    axes.plot(*zip(*points, strict=True), **{**look, **style})


def rounded(count: int, *, whole: bool = False) -> MaxNLocator:
    """At most ``count`` ticks or so, at steps of 1, 2 or 5 times a power of ten."""
    return MaxNLocator(count, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1)


def tag(artist: Artist, title: str = "", *, key: str = "") -> None:
    """Give a shape what a pointer that rests on it reads, and what the page's script knows it by."""
    artist.set_gid(f"tag:{key}|{title}")


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Labels' heights moved apart to ``gap`` pixels, in order, within [low, high] as far as they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(wanted[i], placed[-1] + gap if placed else low))
    limit = high
    for k in reversed(range(len(placed))):
        placed[k] = limit = min(placed[k], limit)
        limit -= gap
    heights = dict(zip(order, placed, strict=True))
    return [heights[i] for i in range(len(wanted))]


def ends(
    axes: Axes,
    labels: Sequence[tuple[float, str, str]],
    *,
    gap: float,
    lead: float = 0,
    **style: Any,
) -> list[float]:
    """Names of curves beside their ends, moved apart: (value, text, colour) each.

    ``lead`` is the length of a line from the end to its name. Gives the names' heights above the plot's bottom.
    """
    (low, high), tall = axes.get_ylim(), float(axes.bbox.height)
    wanted = [(value - low) / (high - low) * tall for value, *_ in labels]
    heights = spread(wanted, gap=gap, low=0, high=tall)
    for (value, text, color), height, wish in zip(labels, heights, wanted, strict=True):
        line = {"arrowstyle": "-", "color": COLOR[color], "shrinkA": 1, "shrinkB": 1, "lw": 1}
        beside(
            axes,
            text,
            (1, value),
            (lead + 5, height - wish),
            color=color,
            units=("axes fraction", "data"),
            arrowprops={**line, "relpos": (0, 0.6)} if lead else None,
            **style,
        )
    return heights


@themed
def svg(figure: Figure, *, label: str) -> str:
    """The figure as SVG text on white, with ``label`` as its text alternative; equal figures give equal text.

    Nothing is cut off at a plot's edge, so that the page needs no ``url()``.
    """
    out = io.StringIO()
    width, height = round(figure.bbox.width), round(figure.bbox.height)
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": f"{label} {width}"}):  # ids differ within a page
        figure.savefig(out, format="svg", metadata=nothing)
    text = re.sub(r"^.*?</style>\s*</defs>", "", out.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="tag:([^"|]*)\|([^"]*)">', _tagged, text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (d|x|y)="([^"]*)"', _short, text)
    text = re.sub(r' clip-path="[^"]*"|<defs>\s*<clipPath.*?</defs>', "", text, flags=re.DOTALL)
    text = re.sub(r' transform="rotate\(-0 [^"]*"|font-family: [^;]*; |(?<=\n) +', "", text)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' width="{width}" height="{height}" font-family=\'{FONT}\''
        f' viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}"'
        f' stroke-linejoin="round">{text.rstrip()}'
    )


def _tagged(match: re.Match[str]) -> str:
    """A group with the key and title that ``tag`` gave."""
    key, title = match.groups()
    return (f'<g data-k="{key}">' if key else "<g>") + (title and f"<title>{title}</title>")


def _short(match: re.Match[str]) -> str:
    """A path or a coordinate in hundredths of a pixel."""
    numbers = re.sub(r"(\.\d\d)\d+", r"\1", " ".join(match[2].split()))
    return f' {match[1]}="{numbers}"'


def inlined(text: str, *, name: str) -> str:
    """An SVG text as it stands inside a page, with a class: the page decides on colours, size and font."""
    head, _, body = text.partition(">")
    place = head[head.index(" viewBox") :]
    body = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda hex_: VARIABLE.get(hex_[0], hex_[0]), body)
    return f'<svg class="{name}"{place}>{body}'


@themed
def write_png(figure: Figure, path: Path, *, title: str) -> None:
    """Write the figure as a PNG file on white, two pixels a CSS pixel; a reader never meets half of it."""
    (width, height), margin = figure.get_size_inches(), MARGIN / 72
    part = path.with_name(path.name + ".part")
    figure.savefig(
        part,
        format="png",
        dpi=144,
        bbox_inches=Bbox.from_extents(-margin, -margin, width + margin, height + margin),
        metadata={"Software": None, "Description": title},
        pil_kwargs={"compress_level": 3},
    )
    os.replace(part, path)
