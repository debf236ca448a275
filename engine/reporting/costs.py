"""What the run cost, as sketches for a width in CSS pixels: where the time went, and how fast members were trained."""

from __future__ import annotations

import numpy as np

from engine.reporting.axes import mark_initial, trial_axis, trial_range
from engine.reporting.facts import Run
from engine.reporting.sketch import Box, Frame, Line, Marks, Sketch, Text, is_wide, ticks
from engine.reporting.words import TIME_LABELS, duration, time_parts

MANY = 300
"""From this many trials on, marks are small and let others shine through."""
TIME_COLORS = dict(
    zip(
        TIME_LABELS,
        ("task6", "task1", "task3", "task2", "task4", "task5", "task7", "task0"),
        strict=True,
    )
)


def time(run: Run, width: float) -> Sketch:
    """Where the run's time went: one bar."""
    parts = time_parts(run)
    total = sum(parts.values())
    columns = 4 if is_wide(width) else 2
    lines = -(-len(parts) // columns)
    sketch = Sketch(width, 44 + 46 * lines)
    x = 0.0
    for i, (part, seconds) in enumerate(parts.items()):
        span = seconds / total * width
        share = f"{100 * seconds / total:.0f} %" if seconds / total >= 0.005 else "< 1 %"
        say = f"{TIME_LABELS[part]} {duration(seconds)}, {share}"
        shown = max(span - 1.5, 0.6)
        color = TIME_COLORS[part]
        sketch.add(Box(x, 0, shown, 30, color, 3 if shown > 6 else 0, title=say))
        if span > 52:
            sketch.add(Text(x + 10, 15, share, "on-high", 12, bold=True))
        x += span
        left, top = (i % columns) * width / columns, 44 + 46 * (i // columns)
        sketch.add(Box(left, top + 6, 10, 10, color, 2))
        sketch.add(Text(left + 17, top + 11, TIME_LABELS[part], "ink", 12, bold=True))
        sketch.add(Text(left + 17, top + 28, f"{duration(seconds)} · {share}", "muted", 12))
    return sketch


def rates(run: Run, width: float) -> Sketch:
    """Training clips a second of every member over the search, and their median."""
    wide = is_wide(width)
    known = [(t.number, t.clips_per_second) for t in run.complete if t.clips_per_second]
    top = 1.1 * max(rate for _, rate in known)
    sketch = Sketch(width, 220)
    frame = Frame(sketch, 48, 28, width - 60, 148, trial_range(run), (0.0, top))
    marked = ticks(0, top, count=5)
    frame.rules(marked, digits=0 if len(marked) < 2 or marked[1] >= 1 else 2)
    mark_initial(frame, run)
    points = tuple((frame.x(k), frame.y(rate)) for k, rate in known)
    many = len(points) > MANY
    sketch.add(Marks(points, "accent", 3.0 if many else 6.0, alpha=0.55 if many else 1.0))
    y = frame.y(float(np.median([rate for _, rate in known])))
    sketch.add(Line(((frame.left, y), (frame.right, y)), "ink", 1.4, dash=True))
    trial_axis(frame, count=10 if wide else 5)
    return sketch
