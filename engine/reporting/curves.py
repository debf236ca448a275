"""The report's curves as sketches for a width in CSS pixels: fitness, the paper's Figs. 6 and 8, and the time.

The x axis of the search is the trial's number. Weights are followed over the search as the mean over the fittest
members so far, faint while the population is still drawn at random.
"""

from __future__ import annotations

import numpy as np

from engine.objective.terms import NUM_LAYERS, TERM_NAMES, TERMS
from engine.reporting.facts import Array, Run, Stat, fitness_of, fittest_means, stat
from engine.reporting.sketch import Box, Frame, Line, Marks, Sketch, Text, is_wide, spread, ticks
from engine.reporting.words import (
    DISTILLED,
    MODALITY_LABELS,
    TASK_LABELS,
    TIME_LABELS,
    duration,
    time_parts,
)

TASK_COLORS = {task: f"task{i}" for i, task in enumerate(TASK_LABELS)}
TIME_COLORS = dict(
    zip(
        TIME_LABELS,
        ("task6", "task1", "task3", "task2", "task4", "task5", "task7", "task0"),
        strict=True,
    )
)
LEVELS = (
    ("best", "best loss, fresh seeds"),
    ("random", "random losses, fresh seeds"),
    ("untrained", "untrained network"),
)
"""Keys of the summary that are also names of colours, and what they are called."""
Level = tuple[str, str, Stat]
MANY = 300
"""From this many trials on, marks are small and let others shine through."""


def trial_range(run: Run) -> tuple[float, float]:
    """The x axis of the search: from half before the first trial to half after the last."""
    return run.trials[0].number - 0.5, run.trials[-1].number + 0.5


def trial_axis(frame: Frame, *, count: int, name: str = "trial") -> None:
    """About ``count`` trial numbers under a plot."""
    frame.ticks(ticks(*frame.xlim, count=count, whole=True), name=name)


def mark_initial(frame: Frame, run: Run, *, label: bool = True) -> None:
    """A line where the initial population ends, if children follow it."""
    initial = [t.number for t in run.initial]
    if not initial or max(initial) >= run.trials[-1].number:
        return
    x = frame.x(max(initial) + 0.5)
    frame.sketch.add(Line(((x, frame.top - 12), (x, frame.bottom)), "muted", dash=True, alpha=0.7))
    if label and x - frame.left > 112:
        frame.sketch.add(Text(x - 6, frame.top - 9, "initial population", "muted", 11, "end"))
    if label and frame.right - x > 62:
        frame.sketch.add(Text(x + 6, frame.top - 9, "evolution", "muted", 11))


def follow(
    frame: Frame,
    run: Run,
    at: Array,
    values: Array,
    *,
    color: str,
    width: float,
    alpha: float = 1.0,
) -> None:
    """A weight over the search, faint while the population is still being drawn at random."""
    at, values = np.append(at, frame.xlim[1]), np.append(values, values[-1])
    turn = max((t.number for t in run.initial), default=-1)
    if turn >= run.trials[-1].number:
        turn = -1
    early = int(np.searchsorted(at, turn, side="right"))
    if early:
        edge, held = turn + 0.5, values[early - 1]
        frame.steps(
            np.append(at[:early], edge),
            np.append(values[:early], held),
            color=color,
            width=max(1.0, width - 0.7),
            alpha=round(0.4 * alpha, 2),
        )
        at, values = np.insert(at[early:], 0, edge), np.insert(values[early:], 0, held)
    frame.steps(at, values, color=color, width=width, alpha=alpha)


def fitness(run: Run, width: float) -> Sketch:
    """Every member's fitness over the search, the best so far, and the levels it is to be judged by."""
    wide = is_wide(width)
    levels = [
        (key, name, s) for key, name in LEVELS if (s := stat(run.summary.get(key))) is not None
    ]
    values = [fitness_of(t) for t in run.complete]
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
    _fitness_key(sketch, failed=bool(run.failed))
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
    first = {t.number for t in run.initial}
    where = {t.number: (frame.x(t.number), frame.y(fitness_of(t))) for t in run.complete}
    children = tuple(point for k, point in where.items() if k not in first)
    rings = tuple(point for k, point in where.items() if k in first)
    failed = tuple((frame.x(t.number), frame.bottom + 10) for t in run.failed)
    frame.sketch.add(
        Marks(children, "accent", size, alpha=alpha),
        Marks(rings, "accent", size - 1, "ring", alpha=alpha),
        Marks(failed, "failed", 4 if many else 7, "cross", alpha=alpha),
    )


def _fitness_key(sketch: Sketch, *, failed: bool) -> None:
    sketch.add(
        Marks(((50, 12),), "accent", 6, "ring"), Text(59, 12, "initial population", "muted", 11)
    )
    sketch.add(Marks(((174, 12),), "accent", 7), Text(183, 12, "child", "muted", 11))
    if failed:
        sketch.add(Marks(((230, 12),), "failed", 7, "cross"), Text(239, 12, "failed", "muted", 11))


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


def layers(run: Run, width: float) -> Sketch:
    """Fig. 6: distillation weights by layer, (a) of the best loss and (b) over the search."""
    wide = is_wide(width)
    sketch = Sketch(width, 290 if wide else 838)
    left, top = (322.0, 0.0) if wide else (0.0, 306.0)
    for x, y, letter, what in (
        (0.0, 10.0, "a", "the best loss, by layer"),
        (left, top + 10, "b", "mean of the fittest so far, by layer 0 to 4"),
    ):
        sketch.add(Text(x, y, letter, size=13, bold=True), Text(x + 16, y, what))
    first = Frame(sketch, 36, 46, 200 if wide else width - 96, 198, (-0.15, 4.15))
    _layers_of_best(first, run)
    at, means = fittest_means(run)
    each = (width - left - 24) / 3
    for i, m in enumerate(DISTILLED):
        x, y = (left + 28 + i * each, 46.0) if wide else (36.0, top + 46 + i * 166)
        size = (each - 26, 198.0) if wide else (width - 60, 104.0)
        frame = Frame(sketch, x, y, *size, trial_range(run))
        frame.rules((0, 0.5, 1), dashed=0.5, named=i == 0 or not wide)
        sketch.add(Text(x, y - 13, MODALITY_LABELS[m], m, 12, bold=True))
        ends = []
        for k in range(NUM_LAYERS):
            column = means[:, TERM_NAMES.index(f"distill/{m}@{k}")]
            follow(frame, run, at, column, color=m, width=1.2 + 0.3 * k, alpha=0.4 + 0.15 * k)
            ends.append(frame.y(float(column[-1])))
        for k, end in enumerate(spread(ends, gap=12, low=frame.top, high=frame.bottom)):
            sketch.add(Text(frame.right + 5, end, str(k), m, 11))
        trial_axis(frame, count=3, name="trial" if wide or i == 2 else "")
    return sketch


def _layers_of_best(frame: Frame, run: Run) -> None:
    assert run.weights is not None
    frame.rules((0, 0.25, 0.5, 0.75, 1), digits=2)
    frame.ticks(range(NUM_LAYERS), name="layer (0 = stem)")
    series = {m: [run.weights[f"distill/{m}@{k}"] for k in range(NUM_LAYERS)] for m in DISTILLED}
    wanted = [frame.y(values[-1]) for values in series.values()]
    ends = spread(wanted, gap=16, low=frame.top, high=frame.bottom)
    for (m, values), y in zip(series.items(), ends, strict=True):
        points = tuple((frame.x(k), frame.y(v)) for k, v in enumerate(values))
        frame.sketch.add(Line(points, m, 2.2), Marks(points, m, 7))
        frame.sketch.add(Text(frame.right + 10, y, MODALITY_LABELS[m], m, 12, bold=True))


def tasks(run: Run, width: float) -> Sketch:
    """Fig. 8: each task's weight over the search, the mean over the fittest members and over modalities."""
    wide = is_wide(width)
    sketch = Sketch(width, 366 if wide else 326)
    frame = Frame(
        sketch, 36, 28, width - 36 - (158 if wide else 124), sketch.height - 70, trial_range(run)
    )
    at, means = fittest_means(run)
    curves = {
        task: means[:, [i for i, t in enumerate(TERMS) if t.task == task]].mean(axis=1)
        for task in TASK_LABELS
    }
    frame.rules((0, 0.25, 0.5, 0.75, 1), digits=2, dashed=0.5)
    mark_initial(frame, run)
    wanted = [frame.y(float(curve[-1])) for curve in curves.values()]
    gap = 17 if wide else 16
    ends = spread(wanted, gap=gap, low=frame.top, high=frame.bottom)
    for (task, curve), wish, y in zip(curves.items(), wanted, ends, strict=True):
        color = TASK_COLORS[task]
        follow(frame, run, at, curve, color=color, width=2.2)
        sketch.add(
            Line(((frame.right, wish), (frame.right + 9, y), (frame.right + 12, y)), color, 1)
        )
        value = f"{curve[-1]:.2f}"
        sketch.add(Text(frame.right + 16, y, value, color, 12 if wide else 11, bold=True))
        sketch.add(Text(frame.right + 46, y, TASK_LABELS[task], color, 12 if wide else 11))
    trial_axis(frame, count=8 if wide else 4)
    return sketch


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
