"""Figures as lists of shapes in CSS pixels, y downwards: one sketch serves the page, SVG files and PNG files.

Colours are names of ``PALETTE``. Inside the page each is a CSS variable, so that one SVG serves light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from engine.reporting.facts import Array

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
    "on-low": ("#1b1f24", "#eef1f3"),
    "on-high": ("#ffffff", "#0b1014"),
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
"""Every colour that a figure may use, on light and on dark ground."""
FONT = 'Inter, ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
WIDE, NARROW = 820, 350
"""Widths in CSS pixels of a figure on a desktop and on a phone."""
Anchor = Literal["start", "middle", "end"]
Mark = Literal["dot", "ring", "cross", "down"]
Point = tuple[float, float]


def is_wide(width: float) -> bool:
    """Whether a figure of this width is laid out for a desktop."""
    return width > (WIDE + NARROW) / 2


def shade(weight: float) -> tuple[str, str]:
    """The ramp's colour of a weight in [0, 1], and that of letters on it."""
    level = round(min(max(weight, 0.0), 1.0) * (len(RAMP) - 1))
    return f"q{level}", "on-high" if level >= TURN else "on-low"


@dataclass(frozen=True)
class Text:
    """A line of text whose middle is at height y."""

    x: float
    y: float
    text: str
    color: str = "ink"
    size: float = 12
    anchor: Anchor = "start"
    bold: bool = False
    key: str = ""
    """What the page's script knows it by."""

    @property
    def baseline(self) -> float:
        """Height of the baseline, for letters of about 0.72 of the size."""
        return self.y + 0.36 * self.size


@dataclass(frozen=True)
class Box:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    color: str
    radius: float = 0
    alpha: float = 1
    title: str = ""
    """What a pointer that rests on it is told."""
    key: str = ""
    """What the page's script knows it by."""


@dataclass(frozen=True)
class Line:
    """A polyline."""

    points: tuple[Point, ...]
    color: str
    width: float = 1
    alpha: float = 1
    dash: bool = False


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[Point, ...]
    color: str
    alpha: float = 1


@dataclass(frozen=True)
class Marks:
    """One mark a point."""

    points: tuple[Point, ...]
    color: str
    size: float
    kind: Mark = "dot"
    alpha: float = 1
    key: str = ""
    """What the page's script knows them by."""


@dataclass
class Sketch:
    """A figure: its size in CSS pixels and its shapes, first one lowest."""

    width: float
    height: float
    shapes: list[Text | Box | Line | Area | Marks] = field(default_factory=list)

    def add(self, *shapes: Text | Box | Line | Area | Marks) -> None:
        """Put shapes on top."""
        self.shapes.extend(shapes)


@dataclass(frozen=True)
class Frame:
    """A plot's box on a sketch, with the ranges of its axes."""

    sketch: Sketch
    left: float
    top: float
    width: float
    height: float
    xlim: tuple[float, float]
    ylim: tuple[float, float] = (0.0, 1.0)

    @property
    def right(self) -> float:
        """Right edge in pixels."""
        return self.left + self.width

    @property
    def bottom(self) -> float:
        """Bottom edge in pixels."""
        return self.top + self.height

    def x(self, value: float) -> float:
        """Pixel of a value on the x axis."""
        low, high = self.xlim
        return self.left + (value - low) / (high - low) * self.width

    def y(self, value: float) -> float:
        """Pixel of a value on the y axis."""
        low, high = self.ylim
        return self.top + (high - value) / (high - low) * self.height

    def rules(
        self,
        values: Iterable[float],
        *,
        digits: int = 1,
        dashed: float | None = None,
        named: bool = True,
    ) -> None:
        """Horizontal rules with their values, one of them dashed."""
        for value in values:
            y = self.y(value)
            ends = ((self.left, y), (self.right, y))
            marked = value == dashed
            alpha = 0.7 if marked else 1
            self.sketch.add(Line(ends, "muted" if marked else "rule", dash=marked, alpha=alpha))
            if named:
                self.sketch.add(Text(self.left - 7, y, f"{value:.{digits}f}", "muted", 11, "end"))

    def ticks(self, values: Iterable[float], *, name: str = "") -> None:
        """Whole numbers under the box, and what they count."""
        for value in values:
            x = self.x(value)
            self.sketch.add(
                Line(((x, self.bottom + 1), (x, self.bottom + 5)), "muted"),
                Text(x, self.bottom + 14, f"{value:,.0f}", "muted", 11, "middle"),
            )
        if name:
            middle = self.left + self.width / 2
            self.sketch.add(Text(middle, self.bottom + 31, name, "muted", 11, "middle"))

    def steps(
        self, at: Array, values: Array, *, color: str, width: float = 2, alpha: float = 1
    ) -> None:
        """A line that keeps each value until the next."""
        xs = np.repeat([self.x(float(v)) for v in at], 2)[1:]
        ys = np.repeat([self.y(float(v)) for v in values], 2)[:-1]
        self.sketch.add(
            Line(tuple(zip(xs.tolist(), ys.tolist(), strict=True)), color, width, alpha)
        )


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """At most ``count`` or so round values within [low, high], at steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(count, 1)
    power = 10.0 ** np.floor(np.log10(rough)) if rough > 0 else 1.0
    step = float(next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999))
    step = max(step, 1.0) if whole else step
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor(high / step + 1e-9))
    return [round(k * step, 10) for k in range(first, last + 1)]


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
