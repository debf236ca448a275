"""The roofline: each stage's speed over its arithmetic intensity, below what memory and products allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.bench.rows import BANDWIDTH, COMPUTE, Limit, Row, teraflops

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")


def check_path(path: Path) -> None:
    """Raise ValueError for a picture that can't be written, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {path}: name a picture that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.absolute().parent}")


def points(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(label, FLOP per byte, TFLOP/s) of the rows that count both bytes and FLOPs."""
    return [
        (f"{row.part}: {row.name}", row.flops / row.bytes, teraflops(row.flops, row.ms[1]))
        for row in rows
        if row.flops and row.bytes
    ]


def roofs(rows: Sequence[Row]) -> tuple[list[Limit], list[Limit]]:
    """The bandwidths and the products' peaks that rows are held against, each once, the highest first."""
    found = {row.limit.name: row.limit for row in rows if row.limit is not None}
    ordered = sorted(found.values(), key=lambda limit: -limit.value)
    return (
        [limit for limit in ordered if limit.unit == BANDWIDTH],
        [limit for limit in ordered if limit.unit == COMPUTE],
    )


def draw_roofline(rows: Sequence[Row], path: Path) -> bool:
    """Write the picture; False, and no picture, where no row has both bytes and FLOPs."""
    from matplotlib.figure import Figure

    shown = points(rows)
    if not shown:
        return False
    bandwidths, peaks = roofs([row for row in rows if row.flops and row.bytes])
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    intensities = [x for _, x, _ in shown]
    least, most = min(intensities) / 16, max(intensities) * 8
    _draw_roofs(axes, bandwidths, peaks, least=least, most=most)
    _draw_points(axes, shown)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(least, most),
        xlabel="arithmetic intensity, FLOP per byte",
        ylabel="TFLOP/s",
        title=f"Roofline of the stages: {rows[0].about.get('device', '')}",
    )
    axes.margins(y=0.15)
    axes.grid(alpha=0.2)
    if bandwidths or peaks:
        axes.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def _draw_roofs(
    axes: Axes, bandwidths: list[Limit], peaks: list[Limit], *, least: float, most: float
) -> None:
    """What memory gives at each intensity, up to where the highest peak is reached; then the peaks."""
    for limit in bandwidths:
        turn = max((peak.value for peak in peaks), default=float("inf")) * 1e3 / limit.value
        ends = [least, min(most, turn)]
        axes.plot(
            ends,
            [x * limit.value / 1e3 for x in ends],
            color="0.25",
            label=f"{limit.name}: {limit.value:.3g} {limit.unit}",
        )
    for peak, style in zip(peaks, ("--", ":", "-.") * len(peaks), strict=False):
        starts = peak.value * 1e3 / bandwidths[0].value if bandwidths else least
        axes.plot(
            [min(max(starts, least), most), most],
            [peak.value] * 2,
            color="0.25",
            linestyle=style,
            label=f"{peak.name}: {peak.value:.3g} {peak.unit}",
        )


def _draw_points(axes: Axes, shown: Sequence[tuple[str, float, float]]) -> None:
    """A labelled point a stage; labels evade one another downward and to the left."""
    for i, (label, x, y) in enumerate(shown):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(x, y, "o", color=colour)
        down = sum(_near((x, y), other) for _, *other in shown[:i])
        left = any(ox > 1.05 * x and _near((x, y), (ox, oy), decades=1.0) for _, ox, oy in shown)
        axes.annotate(
            label,
            (x, y),
            (-8 if left else 8, 4 - 11 * down),
            textcoords="offset points",
            ha="right" if left else "left",
            fontsize=8,
            color=colour,
        )


def _near(point: Sequence[float], other: Sequence[float], *, decades: float = 0.5) -> bool:
    """Whether two points' labels would cover each other: so near across, and a fifth of a decade up or down."""
    across, up = (abs(math.log10(a / b)) for a, b in zip(point, other, strict=True))
    return across < decades and up < 0.2
