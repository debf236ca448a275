"""Fitness over the search, and the steps that led to the best member, as sketches for a width in CSS pixels."""

from __future__ import annotations

import numpy as np

from engine.objective.terms import BY_NAME
from engine.reporting.axes import mark_initial, trial_axis, trial_range
from engine.reporting.facts import Run, fitness_of
from engine.reporting.measures import Stat, Step, lineage, stat
from engine.reporting.sketch import (
    Box,
    Frame,
    Line,
    Mark,
    Marks,
    Sketch,
    Text,
    is_wide,
    spread,
    ticks,
)

LEVELS = (
    ("best", "best loss, fresh seeds"),
    ("random", "random losses, fresh seeds"),
    ("untrained", "untrained network"),
)
"""Keys of the summary that are also names of colours, and what they are called."""
Level = tuple[str, str, Stat]
ROWS = 25
"""Steps of a lineage that are drawn: the last ones."""
STEP = 22.0
"""Height of a row of the lineage."""
MANY = 300
"""From this many trials on, marks are small and let others shine through."""


def fitness(run: Run, width: float) -> Sketch:
    """Every member's fitness over the search, the best so far, and the levels it is to be judged by."""
    wide = is_wide(width)
    levels = [
        (key, name, s) for key, name in LEVELS if (s := stat(run.summary.get(key))) is not None
    ]
    values = [fitness_of(t) for t in run.complete]
    values += [t.partial for t in run.pruned if t.partial is not None]
    values += [s.mean + side * (s.sd or 0) for _, _, s in levels for side in (-1, 1)]
    pad = max(0.06 * (max(values) - min(values)), 0.005)
    ylim = (min(values) - pad, max(values) + pad)
    below = 0 if wide else 22 * (len(levels) + 1)
    strip = 24 if run.failed else 0
    plot = 270 if wide else 220
    sketch = Sketch(width, 56 + plot + strip + 40 + below)
    room = 200 if wide else 8
    frame = Frame(sketch, 44, 56, width - 44 - room, plot, trial_range(run), ylim)
    steps = ticks(*ylim, count=6)
    frame.rules(steps, digits=2 if len(steps) < 2 or steps[1] - steps[0] > 0.0099 else 3)
    _bands(frame, levels)
    mark_initial(frame, run)
    _members(frame, run)
    under = Frame(sketch, frame.left, frame.top, frame.width, plot + strip, frame.xlim)
    trial_axis(under, count=10 if wide else 5)
    _fitness_key(sketch, run)
    top = fitness_of(run.improvements[-1])
    rows = [("best so far in the search", f"{top:.3f}", "ink", top)]
    for key, name, s in levels:
        value = f"{s.mean:.3f}" if s.sd is None else f"{s.mean:.3f} ± {s.sd:.3f}"
        rows.append((name, value, key, s.mean))
    _fitness_labels(frame, rows, wide=wide)
    return sketch


def _bands(frame: Frame, levels: list[Level]) -> None:
    """A line at each level's mean and a band of one sd about it."""
    for color, _, s in levels:
        if s.sd is not None:
            high, low = frame.y(s.mean + s.sd), frame.y(s.mean - s.sd)
            frame.sketch.add(Box(frame.left, high, frame.width, low - high, color, alpha=0.16))
        y = frame.y(s.mean)
        frame.sketch.add(Line(((frame.left, y), (frame.right, y)), color, 1.6))


def _members(frame: Frame, run: Run) -> None:
    """Best so far as steps, every member as a mark, and failed ones under the plot."""
    best = run.improvements
    at = np.array([*(t.number for t in best), frame.xlim[1]], dtype=np.float64)
    frame.steps(at, np.array([fitness_of(t) for t in (*best, best[-1])]), color="ink")
    many = len(run.trials) > MANY
    size, alpha = (3.0, 0.55) if many else (7.0, 1.0)
    first = {t.number for t in run.initial} if run.turn is not None else set[int]()
    where = {t.number: (frame.x(t.number), frame.y(fitness_of(t))) for t in run.complete}
    children = tuple(point for k, point in where.items() if k not in first)
    rings = tuple(point for k, point in where.items() if k in first)
    failed = tuple((frame.x(t.number), frame.bottom + 10) for t in run.failed)
    pruned = tuple(
        (frame.x(t.number), frame.y(t.partial)) for t in run.pruned if t.partial is not None
    )
    frame.sketch.add(
        Marks(pruned, "muted", 4 if many else 6, "down", alpha=0.7),
        Marks(children, "accent", size, alpha=alpha),
        Marks(rings, "accent", size - 1, "ring", alpha=alpha),
        Marks(failed, "failed", 4 if many else 7, "cross", alpha=alpha),
    )


def _fitness_key(sketch: Sketch, run: Run) -> None:
    """What the marks mean, in a line."""
    entries: list[tuple[str, str, Mark]] = []
    if run.turn is not None:
        entries.append(("accent", "initial population", "ring"))
    entries.append(("accent", "child" if run.evolved else "member", "dot"))
    if run.pruned:
        entries.append(("muted", "pruned", "down"))
    if run.failed:
        entries.append(("failed", "failed", "cross"))
    x = 50.0
    for color, name, kind in entries:
        sketch.add(Marks(((x, 12),), color, 7, kind), Text(x + 9, 12, name, "muted", 11))
        x += 27 + 5.8 * len(name)


def _fitness_labels(frame: Frame, rows: list[tuple[str, str, str, float]], *, wide: bool) -> None:
    """Names of the levels: beside the plot where there is room, else under it."""
    sketch = frame.sketch
    if not wide:
        for i, (name, value, color, _) in enumerate(rows):
            y = sketch.height - 22 * (len(rows) - i) + 12
            sketch.add(Line(((44, y), (64, y)), color, 3), Text(72, y, value, color, 12, bold=True))
            sketch.add(Text(172, y, name, "muted", 12))
        return
    wanted = [frame.y(row[3]) for row in rows]
    for (name, value, color, level), y in zip(
        rows, spread(wanted, gap=36, low=frame.top + 8, high=frame.bottom - 12), strict=True
    ):
        lead = ((frame.right + 2, frame.y(level)), (frame.right + 12, y), (frame.right + 17, y))
        sketch.add(Line(lead, color, 1, alpha=0.8))
        sketch.add(Text(frame.right + 22, y - 7, value, color, 13, bold=True))
        sketch.add(Text(frame.right + 22, y + 8, name, "muted", 11))


def ancestry(run: Run, width: float) -> Sketch:
    """The mutations that led to the best member: a row each, with fitness before and after."""
    wide = is_wide(width)
    steps = lineage(run)[-ROWS:]
    known = [f for s in steps for f in (s.fitness_before, s.fitness_after) if f is not None]
    pad = max(0.08 * (max(known) - min(known)), 0.004)
    xlim = (min(known) - pad, max(known) + pad)
    left, room = (220.0, 60.0) if wide else (128.0, 46.0)
    sketch = Sketch(width, 28 + STEP * len(steps) + 40)
    frame = Frame(sketch, left, 24, width - left - room, STEP * len(steps), xlim)
    marked = ticks(*xlim, count=6 if wide else 3)
    for value in marked:
        x = frame.x(value)
        digits = 2 if len(marked) < 2 or marked[1] - marked[0] > 0.0099 else 3
        sketch.add(Line(((x, frame.top), (x, frame.bottom)), "rule"))
        sketch.add(Text(x, frame.bottom + 14, f"{value:.{digits}f}", "muted", 11, "middle"))
    sketch.add(
        Text(frame.left + frame.width / 2, frame.bottom + 31, "fitness", "muted", 11, "middle")
    )
    sketch.add(Text(0, 9, "trial", "muted", 11), Text(44, 9, "weight drawn anew", "muted", 11))
    sketch.add(Text(width, 9, "gain", "muted", 11, "end"))
    for i, step in enumerate(steps):
        _step(frame, step, y=frame.top + (i + 0.5) * STEP, wide=wide)
    return sketch


def _step(frame: Frame, step: Step, *, y: float, wide: bool) -> None:
    sketch = frame.sketch
    sketch.add(Text(0, y, f"{step.trial}", "muted", 11))
    if step.term:
        sketch.add(Text(44, y, BY_NAME[step.term].code, bold=True))
    if wide and step.before is not None and step.after is not None:
        sketch.add(Text(92, y, f"{step.before:.2f} → {step.after:.2f}", "muted", 11))
    elif step.after is not None:
        sketch.add(Text(80, y, f"→ {step.after:.2f}", "muted", 11))
    if step.fitness_after is None:
        return
    after = (frame.x(step.fitness_after), y)
    gain = step.gain
    color = "muted" if gain is None else "best" if gain >= 0 else "random"
    if step.fitness_before is not None and gain is not None:
        before = (frame.x(step.fitness_before), y)
        sketch.add(Line((before, after), color, 3), Marks((before,), color, 7, "ring"))
        sketch.add(Text(sketch.width, y, f"{gain:+.3f}", color, 12, "end", bold=True))
    sketch.add(Marks((after,), color, 8))
