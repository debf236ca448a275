"""Sketches as PNG files, by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Polygon

from engine.reporting.sketch import PALETTE, Area, Box, Line, Marks, Sketch, Text

PNG_SCALE = 2
"""Pixels of a PNG file per CSS pixel."""
MARGIN = 16
"""White space around a PNG file's figure, in CSS pixels."""


def paint(sketch: Sketch, path: Path, *, title: str) -> None:
    """The sketch as a PNG file on white."""
    width, height = sketch.width + 2 * MARGIN, sketch.height + 2 * MARGIN
    figure = Figure(figsize=(width / 72, height / 72), dpi=72 * PNG_SCALE, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN, width - MARGIN), ylim=(height - MARGIN, -MARGIN))
    axes.set_axis_off()
    for order, artist in enumerate(a for shape in sketch.shapes for a in _artists(shape)):
        artist.set_zorder(order)
        axes.add_artist(artist)
    for order, shape in enumerate(s for s in sketch.shapes if isinstance(s, Text)):
        axes.text(
            shape.x,
            shape.baseline,
            shape.text,
            color=PALETTE[shape.color][0],
            fontsize=0.92 * shape.size,  # the font that comes with matplotlib is wide
            ha={"start": "left", "middle": "center", "end": "right"}[shape.anchor],
            fontweight="bold" if shape.bold else "normal",
            fontfamily="DejaVu Sans",
            parse_math=False,
            zorder=len(sketch.shapes) * 2 + order,
        )
    part = path.with_name(path.name + ".part")
    canvas.print_png(  # type: ignore[no-untyped-call]
        part, metadata={"Software": None, "Description": title}
    )
    os.replace(part, path)


def _artists(
    shape: Text | Box | Line | Area | Marks,
) -> Iterator[Line2D | FancyBboxPatch | Polygon]:
    ink = PALETTE[shape.color][0]
    if isinstance(shape, Box):
        round_ = min(shape.radius, shape.width / 2, shape.height / 2)
        style = f"round,pad=0,rounding_size={round_:g}" if round_ else "square,pad=0"
        corner = (shape.x, shape.y)
        yield FancyBboxPatch(
            corner,
            shape.width,
            shape.height,
            boxstyle=style,
            facecolor=ink,
            alpha=shape.alpha,
            lw=0,
        )
    elif isinstance(shape, Area):
        yield Polygon(shape.points, facecolor=ink, alpha=shape.alpha, lw=0)
    elif isinstance(shape, Line | Marks) and shape.points:
        xs, ys = zip(*shape.points, strict=True)
        if isinstance(shape, Line):
            dash: Any = (0, (3 / shape.width, 3 / shape.width)) if shape.dash else "-"
            yield Line2D(xs, ys, color=ink, lw=shape.width, ls=dash, alpha=shape.alpha)
            return
        marker = {"dot": "o", "ring": "o", "cross": "x", "down": "v"}[shape.kind]
        edge = {"ring": 1.4, "cross": 1.6}.get(shape.kind, 0.0)
        face = "none" if shape.kind == "ring" else ink
        yield Line2D(
            xs,
            ys,
            ls="",
            marker=marker,
            ms=shape.size,
            color=ink,
            mfc=face,
            mew=edge,
            alpha=shape.alpha,
        )
