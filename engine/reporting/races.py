"""Searches side by side as sketches for a width in CSS pixels: best so far with bands, and final fitness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from engine.reporting.facts import Array
from engine.reporting.measures import Stat
from engine.reporting.sketch import Area, Box, Frame, Line, Marks, Sketch, Text, is_wide, ticks

COLORS = ("task3", "task6", "task2", "task4", "task7", "task5", "task1", "task0")
KEY = 20.0
"""Height of a group's line in the key."""


class Racers(Protocol):
    """A group of runs, as these figures see it."""

    @property
    def label(self) -> str:
        """What it is called."""

    @property
    def curves(self) -> tuple[Array, ...]:
        """Best fitness so far after each member, a run each."""

    @property
    def band(self) -> tuple[Array, Array]:
        """Mean and sd over its runs."""

    def side(self, key: str) -> Stat | None:
        """Fitness with fresh seeds."""


def color(group: int) -> str:
    """A group's colour."""
    return COLORS[group % len(COLORS)]


def curves(groups: Sequence[Racers], width: float) -> Sketch:
    """Best so far over members: every run faint, each group's mean with a band of one sd."""
    wide = is_wide(width)
    known = np.concatenate([c for g in groups for c in g.curves])
    low, high = float(np.nanmin(known)), float(np.nanmax(known))
    pad = max(0.06 * (high - low), 0.005)
    longest = max(len(c) for g in groups for c in g.curves)
    plot = 300.0 if wide else 230.0
    sketch = Sketch(width, 20 + plot + 52 + KEY * len(groups))
    frame = Frame(sketch, 44, 16, width - 56, plot, (0.5, longest + 0.5), (low - pad, high + pad))
    marked = ticks(*frame.ylim, count=6)
    frame.rules(marked, digits=2 if len(marked) < 2 or marked[1] - marked[0] > 0.0099 else 3)
    frame.ticks(ticks(*frame.xlim, count=10 if wide else 5, whole=True), name="members trained")
    for i, group in enumerate(groups):
        mean, sd = group.band
        _band(frame, mean, sd, ink=color(i))
        for curve in group.curves:
            _follow(frame, curve, ink=color(i), width=1.0, alpha=0.35)
    for i, group in enumerate(groups):
        mean = group.band[0] if len(group.curves) > 1 else group.curves[0]
        _follow(frame, mean, ink=color(i), width=2.4, alpha=1.0)
        y = sketch.height - KEY * (len(groups) - i - 0.5)
        end = mean[~np.isnan(mean)]
        value = f"{end[-1]:.3f}" if len(end) else "none"
        sketch.add(Line(((4, y), (24, y)), color(i), 3), Text(32, y, value, color(i), bold=True))
        sketch.add(Text(74, y, _short(group.label, wide=wide), "muted", 12 if wide else 11))
    return sketch


def _short(label: str, *, wide: bool) -> str:
    """A label that fits its line; the tables have all of it."""
    room = 110 if wide else 44
    return label if len(label) <= room else label[: room - 1] + "…"


def _follow(frame: Frame, curve: Array, *, ink: str, width: float, alpha: float) -> None:
    """Steps from the first member with a fitness on; only where they rise, and at the end."""
    at = np.flatnonzero(~np.isnan(curve))
    if len(at) == 0:
        return
    values = curve[at]
    kept = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    xs = np.append(at[kept] + 1.0, at[-1] + 1.5)
    frame.steps(xs, np.append(values[kept], values[-1]), color=ink, width=width, alpha=alpha)


def _band(frame: Frame, mean: Array, sd: Array, *, ink: str) -> None:
    """One sd about the mean, where there are several runs."""
    at = np.flatnonzero(~np.isnan(mean))
    if len(at) == 0 or not np.any(sd[at] > 0):
        return
    edges = np.repeat(np.append(at + 1.0, at[-1] + 1.5), 2)[1:-1]
    points = []
    for side in (1, -1):
        heights = np.clip(np.repeat(mean[at] + side * sd[at], 2), *frame.ylim)
        line = [(frame.x(x), frame.y(y)) for x, y in zip(edges, heights, strict=True)]
        points += line if side == 1 else line[::-1]
    frame.sketch.add(Area(tuple(points), ink, 0.16))


def final(groups: Sequence[Racers], width: float) -> Sketch:
    """Fitness with fresh seeds: a row a group, the best losses beside random ones and the untrained network."""
    wide = is_wide(width)
    rows = [(i, g, key) for i, g in enumerate(groups) for key in ("best", "random", "untrained")]
    stats = [s for _, g, key in rows if (s := g.side(key)) is not None]
    edges = [x for s in stats for x in (*s.values, s.mean - (s.sd or 0), s.mean + (s.sd or 0))]
    pad = max(0.06 * (max(edges) - min(edges)), 0.005)
    each, head = 20.0, 24.0
    left = 130.0 if wide else 84.0
    tall = len(groups) * (3 * each + head)
    sketch = Sketch(width, tall + 44)
    room = 110.0 if wide else 84.0
    xlim = (min(edges) - pad, max(edges) + pad)
    frame = Frame(sketch, left, 6, width - left - room, tall, xlim)
    for value in ticks(*xlim, count=6 if wide else 3):
        x = frame.x(value)
        sketch.add(Line(((x, frame.top), (x, frame.bottom)), "rule"))
        sketch.add(Text(x, frame.bottom + 14, f"{value:g}", "muted", 11, "middle"))
    middle = frame.left + frame.width / 2
    sketch.add(Text(middle, frame.bottom + 31, "fitness with fresh seeds", "muted", 11, "middle"))
    for k, (i, group, key) in enumerate(rows):
        y = frame.top + i * (3 * each + head) + head + (k % 3 + 0.5) * each
        if key == "best":
            sketch.add(
                Text(0, y - 0.5 * each - 8, _short(group.label, wide=wide), color(i), 12, bold=True)
            )
        if (s := group.side(key)) is None:
            sketch.add(Text(left, y, "not measured", "muted", 11))
            continue
        ink = color(i) if key == "best" else key
        sketch.add(
            Text(left - 10, y, f"{key} loss" if key != "untrained" else key, "muted", 11, "end")
        )
        _spread(frame, s, y=y, ink=ink)
        say = f"{s.mean:.3f}" if s.sd is None else f"{s.mean:.3f} ± {s.sd:.3f}"
        sketch.add(Text(width, y, say, ink, 11, "end", bold=key == "best"))
    return sketch


def _spread(frame: Frame, s: Stat, *, y: float, ink: str) -> None:
    """One sd as a bar, the mean as a mark, every value as a dot."""
    if s.sd is not None:
        low, high = frame.x(s.mean - s.sd), frame.x(s.mean + s.sd)
        frame.sketch.add(Box(low, y - 4, high - low, 8, ink, 4, 0.28))
    frame.sketch.add(Marks(tuple((frame.x(v), y) for v in s.values[:50]), ink, 5, alpha=0.75))
    frame.sketch.add(Box(frame.x(s.mean) - 1.5, y - 8, 3, 16, ink, 1))
