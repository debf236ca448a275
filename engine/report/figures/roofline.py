"""The roofline: each stage's speed over its arithmetic intensity, below what memory and products allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.report.figures.compare import color
from engine.report.figures.theme import COLOR, beside, dots, place, sheet, themed


@themed
def roofline(
    points: Sequence[tuple[str, float, float]],
    bandwidths: Sequence[tuple[str, float]],
    peaks: Sequence[tuple[str, float]],
    *,
    title: str,
) -> Figure:
    """Points (label, FLOP per byte, TFLOP/s) below roofs (label, value): bandwidths in GB/s, peaks in TFLOP/s."""
    figure = sheet(820, 480)
    axes = place(figure, 70, 40, 730, 390, title=title)
    intensities = [x for _, x, _ in points]
    least, most = min(intensities) / 16, max(intensities) * 8
    highest = max((value for _, value in peaks), default=math.inf)
    for label, value in bandwidths:  # what memory gives, up to where the highest peak is reached
        ends = [least, min(most, highest * 1e3 / value)]
        axes.plot(ends, [x * value / 1e3 for x in ends], color=COLOR["ink"], lw=1.4, label=label)
    for (label, value), style in zip(peaks, ("--", ":", "-.") * len(peaks), strict=False):
        start = max(value * 1e3 / bandwidths[0][1], least) if bandwidths else least
        ends = [min(start, most), most]
        axes.plot(ends, [value] * 2, color=COLOR["ink"], lw=1.4, ls=style, label=label)
    _draw_points(axes, points)
    axes.set(xscale="log", yscale="log", xlim=(least, most))
    axes.set(xlabel="arithmetic intensity, FLOP per byte", ylabel="TFLOP/s")
    axes.margins(y=0.15)
    axes.grid(axis="both")
    if bandwidths or peaks:
        axes.legend(loc="lower right")
    return figure


def _draw_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """A labelled point a stage; labels evade one another downward and to the left."""
    for i, (label, x, y) in enumerate(points):
        dots(axes, [(x, y)], color=color(i), size=6)
        down = sum(_near((x, y), other) for _, *other in points[:i])
        left = any(ox > 1.05 * x and _near((x, y), (ox, oy), decades=1.0) for _, ox, oy in points)
        offset = (-8 if left else 8, 4 - 13 * down)
        beside(axes, label, (x, y), offset, color=color(i), ha="right" if left else "left")


def _near(point: Sequence[float], other: Sequence[float], *, decades: float = 0.5) -> bool:
    """Whether two points' labels would cover each other: so near across, and a fifth of a decade up or down."""
    across, up = (abs(math.log10(a / b)) for a, b in zip(point, other, strict=True))
    return across < decades and up < 0.2
