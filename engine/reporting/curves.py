"""The paper's Figs. 6 and 8 as sketches for a width in CSS pixels: weights of layers and of tasks over the search.

The x axis is the trial's number. Weights are followed as the mean over the fittest members so far, faint while
the population is still drawn at random.
"""

from __future__ import annotations

from engine.objective.terms import MODALITY_LETTERS, NUM_LAYERS, TERM_NAMES, TERMS
from engine.reporting.axes import follow, mark_initial, trial_axis, trial_range
from engine.reporting.facts import Run
from engine.reporting.measures import fittest_means
from engine.reporting.sketch import Frame, Line, Marks, Sketch, Text, is_wide, spread
from engine.reporting.words import DISTILLED, MODALITY_LABELS, TASK_LABELS

MODALITY_COLORS = {"rgb": "task4", "grey": "grey", "flow": "flow", "audio": "audio"}
TASK_COLORS = {task: f"task{i}" for i, task in enumerate(TASK_LABELS)}


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


def modalities(run: Run, width: float) -> Sketch:
    """Fig. 8 by modality: a panel a task, and in it a curve a modality that has the task."""
    wide = is_wide(width)
    columns, tall = (4, 118.0) if wide else (2, 96.0)
    each = width / columns
    lines = -(-len(TASK_LABELS) // columns)
    sketch = Sketch(width, lines * (tall + 62) + 20)
    at, means = fittest_means(run)
    for i, (task, label) in enumerate(TASK_LABELS.items()):
        column, top = i % columns, 26 + (i // columns) * (tall + 62)
        frame = Frame(sketch, column * each + 26, top, each - 56, tall, trial_range(run))
        sketch.add(Text(frame.left, top - 14, label, bold=True))
        frame.rules((0, 0.5, 1), dashed=0.5, named=column == 0)
        ends = []
        for j, term in enumerate(TERMS):
            if term.task == task:
                curve = means[:, j]
                follow(frame, run, at, curve, color=MODALITY_COLORS[term.modality], width=1.8)
                ends.append((term.modality, frame.y(float(curve[-1]))))
        heights = spread([y for _, y in ends], gap=12, low=frame.top, high=frame.bottom)
        for (m, _), y in zip(ends, heights, strict=True):
            color = MODALITY_COLORS[m]
            sketch.add(Text(frame.right + 5, y, MODALITY_LETTERS[m], color, 11, bold=True))
        trial_axis(frame, count=2, name="trial" if i // columns == lines - 1 else "")
    for i, (m, label) in enumerate(MODALITY_LABELS.items()):
        x, y = i * 84, sketch.height - 8
        sketch.add(Line(((x, y), (x + 16, y)), MODALITY_COLORS[m], 3))
        sketch.add(Text(x + 22, y, label, "muted", 11))
    return sketch
