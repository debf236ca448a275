"""The report's figures as sketches, each for a width in CSS pixels: the paper's Figs. 3, 6, 7, 8 and two more.

The x axis of the search is the trial's number; where weights are followed over the search, they are those of
the best loss so far (Fig. 3) or the mean over the fittest members so far (Figs. 6b and 8).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.objective.terms import (
    BY_NAME,
    MODALITIES,
    NUM_LAYERS,
    TERM_NAMES,
    TERMS,
    Term,
)
from engine.reporting.facts import Run, fitness_of, fittest_means, lineage, stat
from engine.reporting.sketch import Box, Frame, Line, Marks, Sketch, Text, shade, spread, ticks
from engine.reporting.words import (
    DISTILLED,
    MODALITY_LABELS,
    TASK_LABELS,
    TIME_LABELS,
    duration,
    time_parts,
)

WIDE, NARROW = 820, 350
"""Widths in CSS pixels of a figure on a desktop and on a phone."""
TASK_SHORT = ("Shuffle", "Backw.", "Align", "Predict", "Recon.", "Color", "Cross", "Embed")
TASK_COLORS = {task: f"task{i}" for i, task in enumerate(TASK_LABELS)}
TIME_COLORS = dict(
    zip(
        TIME_LABELS,
        ("task6", "task1", "task3", "task2", "task4", "task5", "task7", "task0"),
        strict=True,
    )
)


def _is_wide(width: float) -> bool:
    return width > (WIDE + NARROW) / 2


def _trials(run: Run) -> tuple[float, float]:
    return run.trials[0].number - 0.5, run.trials[-1].number + 0.5


def _trial_axis(frame: Frame, *, count: int, name: str = "trial") -> None:
    frame.ticks(ticks(*frame.xlim, count=count, whole=True), name=name)


def _mark_initial(frame: Frame, run: Run, *, label: bool = True) -> None:
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


def fitness(run: Run, width: float) -> Sketch:
    """Every member's fitness over the search, the best so far, and the levels it is to be judged by."""
    wide = _is_wide(width)
    levels = [
        (name, s, color)
        for key, name, color in (
            ("best", "best loss, fresh seeds", "best"),
            ("random", "random losses, fresh seeds", "random"),
            ("untrained", "untrained network", "untrained"),
        )
        if (s := stat(run.summary.get(key))) is not None
    ]
    values = [fitness_of(t) for t in run.complete]
    for _, s, _ in levels:
        values += [s.mean - (s.sd or 0), s.mean + (s.sd or 0)]
    pad = max(0.06 * (max(values) - min(values)), 0.005)
    below = 0 if wide else 22 * (len(levels) + 1)
    strip = 24 if run.failed else 0
    plot = 270 if wide else 220
    sketch = Sketch(width, 56 + plot + strip + 40 + below)
    ylim = (min(values) - pad, max(values) + pad)
    room = 200 if wide else 8
    frame = Frame(sketch, 44, 56, width - 44 - room, plot, _trials(run), ylim)
    steps = ticks(*ylim, count=6)
    frame.rules(steps, digits=2 if len(steps) < 2 or steps[1] - steps[0] > 0.0099 else 3)
    for _, s, color in levels:
        if s.sd is not None:
            high, low = frame.y(s.mean + s.sd), frame.y(s.mean - s.sd)
            sketch.add(Box(frame.left, high, frame.width, low - high, color, alpha=0.16))
        y = frame.y(s.mean)
        sketch.add(Line(((frame.left, y), (frame.right, y)), color, 1.6))
    _mark_initial(frame, run)
    best = run.improvements
    at = np.array([*(t.number for t in best), frame.xlim[1]], dtype=np.float64)
    heights = np.array([*(fitness_of(t) for t in best), fitness_of(best[-1])])
    frame.steps(at, heights, color="ink")
    many = len(run.trials) > 300
    for ring in (False, True):
        points = tuple(
            (frame.x(t.number), frame.y(fitness_of(t))) for t in run.complete if (t.round == 0) == ring
        )
        size = (3.0 if many else 7.0) - ring
        sketch.add(
            Marks(points, "accent", size, "ring" if ring else "dot", alpha=0.55 if many else 1)
        )
    if run.failed:
        points = tuple((frame.x(t.number), frame.bottom + 10) for t in run.failed)
        sketch.add(Marks(points, "failed", 7, "cross"))
    under = Frame(sketch, frame.left, frame.top, frame.width, plot + strip, frame.xlim)
    _trial_axis(under, count=10 if wide else 5)
    _fitness_key(sketch, failed=bool(run.failed))
    rows = [("best so far in the search", f"{fitness_of(best[-1]):.3f}", "ink", fitness_of(best[-1]))]
    for name, s, color in levels:
        value = f"{s.mean:.3f}" if s.sd is None else f"{s.mean:.3f} ± {s.sd:.3f}"
        rows.append((name, value, color, s.mean))
    _fitness_labels(frame, rows, wide=wide)
    return sketch


def _fitness_key(sketch: Sketch, *, failed: bool) -> None:
    sketch.add(Marks(((50, 12),), "accent", 6, "ring"), Text(59, 12, "initial population", "muted", 11))
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


def _groups() -> tuple[list[tuple[str, list[Term]]], list[tuple[str, list[Term]]]]:
    """Terms by task, and distillation's by modality."""
    tasks = [(label, [t for t in TERMS if t.task == task]) for task, label in TASK_LABELS.items()]
    distill = [
        (f"Distil {m}", [t for t in TERMS if t.task == "distill" and t.modality == m])
        for m in DISTILLED
    ]
    return tasks, distill


def _key(sketch: Sketch, x: float, y: float) -> None:
    """The ramp from 0 to 1."""
    sketch.add(Text(x, y, "weight", "muted", 11), Text(x + 46, y, "0", "muted", 11))
    for i in range(21):
        sketch.add(Box(x + 57 + 6 * i, y - 6, 6.3, 12, f"q{i}"))
    sketch.add(Text(x + 189, y, "1", "muted", 11))


def search(run: Run, width: float) -> Sketch:
    """Fig. 3: the weights of the best loss so far at every trial, one row a term."""
    wide = _is_wide(width)
    tasks, distill = _groups()
    row, gap = 15.0, 7.0

    def tall(groups: list[tuple[str, list[Term]]]) -> float:
        return sum(len(terms) for _, terms in groups) * row + gap * (len(groups) - 1)

    first, second = tall(tasks), tall(distill)
    panel = (width - 44) / 2 if wide else width
    height = 40 + first + 40 if wide else 40 + first + 60 + second + 40 + 40
    sketch = Sketch(width, height)
    _search_panel(sketch, run, tasks, left=0, top=40, width=panel, row=row, gap=gap)
    left, top = (panel + 44, 40.0) if wide else (0.0, 40 + first + 60)
    _search_panel(sketch, run, distill, left=left, top=top, width=panel, row=row, gap=gap)
    _key(sketch, left + 118, top + second + 84) if wide else _key(sketch, 60, height - 14)
    return sketch


def _search_panel(
    sketch: Sketch,
    run: Run,
    groups: list[tuple[str, list[Term]]],
    *,
    left: float,
    top: float,
    width: float,
    row: float,
    gap: float,
) -> None:
    rows = sum(len(terms) for _, terms in groups) * row + gap * (len(groups) - 1)
    frame = Frame(sketch, left + 124, top, width - 124 - 32, rows, _trials(run))
    best = run.improvements
    edges = [frame.x(t.number - 0.5) for t in best] + [frame.right]
    y = top
    for label, terms in groups:
        sketch.add(Text(left, y + row / 2, label, "ink", 12))
        for term in terms:
            sketch.add(Text(frame.left - 7, y + row / 2, term.code, "muted", 11, "end"))
            start = 0
            for i, trial in enumerate(best):
                weight = trial.weights[term.name]
                if i + 1 < len(best) and best[i + 1].weights[term.name] == weight:
                    continue
                color, _ = shade(weight)
                say = f"{term.name} {weight:.2f} from trial {best[start].number}"
                sketch.add(Box(edges[start], y, edges[i + 1] - edges[start], row - 1, color, title=say))
                start = i + 1
            final = best[-1].weights[term.name]
            sketch.add(Text(frame.right + 6, y + row / 2, f"{final:.2f}", "muted", 11))
            y += row
        y += gap
    changes = tuple((frame.x(t.number - 0.5), top - 5) for t in best)
    sketch.add(Marks(changes, "ink", 7, "down"))
    _trial_axis(frame, count=5)
    _mark_initial(frame, run, label=False)


def layers(run: Run, width: float) -> Sketch:
    """Fig. 6: distillation weights by layer, (a) of the best loss and (b) over the search."""
    wide = _is_wide(width)
    assert run.weights is not None
    sketch = Sketch(width, 300 if wide else 270 + 3 * 172)
    first = Frame(sketch, 36, 46, 200 if wide else width - 36 - 60, 198, (-0.15, 4.15))
    sketch.add(Text(0, 10, "a", size=13, bold=True), Text(16, 10, "the best loss, by layer", "ink", 12))
    first.rules((0, 0.25, 0.5, 0.75, 1), digits=2)
    first.ticks(range(NUM_LAYERS), name="layer (0 = stem)")
    series = {m: [run.weights[f"distill/{m}@{k}"] for k in range(NUM_LAYERS)] for m in DISTILLED}
    ends = spread([first.y(v[-1]) for v in series.values()], gap=16, low=first.top, high=first.bottom)
    for (m, values), y in zip(series.items(), ends, strict=True):
        points = tuple((first.x(k), first.y(v)) for k, v in enumerate(values))
        sketch.add(Line(points, m, 2.2), Marks(points, m, 7))
        sketch.add(Text(first.right + 10, y, MODALITY_LABELS[m], m, 12, bold=True))
    left, top = (322.0, 0.0) if wide else (0.0, 288.0)
    sketch.add(Text(left, top + 10, "b", size=13, bold=True))
    sketch.add(Text(left + 16, top + 10, "mean of the fittest so far, by layer 0 to 4", "ink", 12))
    at, means = fittest_means(run)
    for i, m in enumerate(DISTILLED):
        each = (width - left - 24) / 3
        x, y = (left + 28 + i * each, 46.0) if wide else (36.0, top + 46 + i * 166)
        frame = Frame(
            sketch, x, y, each - 26 if wide else width - 60, 198 if wide else 104, _trials(run)
        )
        frame.rules((0, 0.5, 1) if i == 0 or not wide else (), dashed=0.5)
        if i and wide:
            _bare_rules(frame)
        sketch.add(Text(x, y - 13, MODALITY_LABELS[m], m, 12, bold=True))
        ends = []
        for k in range(NUM_LAYERS):
            column = means[:, TERM_NAMES.index(f"distill/{m}@{k}")]
            full = np.append(at, frame.xlim[1])
            frame.steps(
                full, np.append(column, column[-1]), color=m, width=1.2 + 0.3 * k, alpha=0.4 + 0.15 * k
            )
            ends.append(frame.y(float(column[-1])))
        for k, end in enumerate(spread(ends, gap=12, low=frame.top, high=frame.bottom)):
            sketch.add(Text(frame.right + 5, end, str(k), m, 11))
        _trial_axis(frame, count=3, name="trial" if wide or i == 2 else "")
    return sketch


def _bare_rules(frame: Frame) -> None:
    for value in (0, 0.5, 1):
        y = frame.y(value)
        marked = value == 0.5
        ends = ((frame.left, y), (frame.right, y))
        frame.sketch.add(Line(ends, "muted" if marked else "rule", dash=marked, alpha=0.7 if marked else 1))


def loss(run: Run, width: float) -> Sketch:
    """Fig. 7: the best loss, one square a term: modality by task, and modality by distilled layer."""
    wide = _is_wide(width)
    assert run.weights is not None
    cell, left = (52.0, 58.0) if wide else (38.0, 45.0)
    sketch = Sketch(width, 40 + 4 * cell + 8 if wide else 40 + 4 * cell + 56 + 3 * cell + 44)
    drawn = {s.term for s in lineage(run)}
    size = 11 if wide else 9

    def square(term: Term, x: float, y: float) -> None:
        assert run.weights is not None
        weight = run.weights[term.name]
        color, letters = shade(weight)
        say = f"{term.name} {weight:.3f}"
        sketch.add(Box(x + 1.5, y + 1.5, cell - 3, cell - 3, color, 5, title=say))
        middle = x + cell / 2
        big, small = (14, 11) if wide else (11, 9)
        sketch.add(Text(middle, y + cell * 0.4, term.code, letters, big, "middle", bold=True))
        sketch.add(Text(middle, y + cell * 0.71, f"{weight:.2f}", letters, small, "middle"))
        if term.name in drawn:
            sketch.add(Marks(((x + cell - 8, y + 8),), letters, 5))

    def block(
        x: float, y: float, rows: Sequence[str], columns: Sequence[str], terms: Sequence[Term], title: str
    ) -> None:
        sketch.add(Text(x, y - 30, title, "ink", 12, bold=True))
        for i, name in enumerate(columns):
            sketch.add(Text(x + (i + 0.5) * cell, y - 9, name, "muted", size, "middle"))
        at = {(t.modality, _column(t)): t for t in terms}
        for j, m in enumerate(rows):
            middle = y + (j + 0.5) * cell
            sketch.add(Text(x - 9, middle, MODALITY_LABELS[m], "muted", size + 1, "end"))
            for i in range(len(columns)):
                if (term := at.get((m, i))) is not None:
                    square(term, x + i * cell, y + j * cell)
                else:
                    sketch.add(Marks(((x + (i + 0.5) * cell, middle),), "rule", 5))

    tasks = [t for t in TERMS if t.task != "distill"]
    distill = [t for t in TERMS if t.task == "distill"]
    block(left, 40, MODALITIES, TASK_SHORT, tasks, "Tasks")
    x, y = (left + 8 * cell + 72, 40.0) if wide else (left, 40 + 4 * cell + 56)
    stages = [str(k) if k else "stem" for k in range(NUM_LAYERS)]
    block(x, y, DISTILLED, stages, distill, "Distillation into RGB, by layer")
    _key(sketch, x, y + 3 * cell + 26)
    return sketch


def _column(term: Term) -> int:
    return list(TASK_LABELS).index(term.task) if term.layer is None else term.layer


def tasks(run: Run, width: float) -> Sketch:
    """Fig. 8: each task's weight over the search, the mean over the fittest members and over modalities."""
    wide = _is_wide(width)
    sketch = Sketch(width, 366 if wide else 326)
    frame = Frame(sketch, 36, 28, width - 36 - (158 if wide else 124), sketch.height - 70, _trials(run))
    at, means = fittest_means(run)
    curves = {
        task: means[:, [i for i, t in enumerate(TERMS) if t.task == task]].mean(axis=1)
        for task in TASK_LABELS
    }
    frame.rules((0, 0.25, 0.5, 0.75, 1), digits=2, dashed=0.5)
    _mark_initial(frame, run)
    wanted = [frame.y(float(curve[-1])) for curve in curves.values()]
    gap = 17 if wide else 16
    ends = spread(wanted, gap=gap, low=frame.top, high=frame.bottom)
    for (task, curve), wish, y in zip(curves.items(), wanted, ends, strict=True):
        color = TASK_COLORS[task]
        full = np.append(at, frame.xlim[1])
        frame.steps(full, np.append(curve, curve[-1]), color=color, width=2.2)
        sketch.add(Line(((frame.right, wish), (frame.right + 9, y), (frame.right + 12, y)), color, 1))
        value = f"{curve[-1]:.2f}"
        sketch.add(Text(frame.right + 16, y, value, color, 12 if wide else 11, bold=True))
        sketch.add(Text(frame.right + 46, y, TASK_LABELS[task], color, 12 if wide else 11))
    _trial_axis(frame, count=8 if wide else 4)
    return sketch


def time(run: Run, width: float) -> Sketch:
    """Where the run's time went: one bar."""
    parts = time_parts(run)
    total = sum(parts.values())
    columns = 4 if _is_wide(width) else 2
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


assert set(BY_NAME) == {t.name for groups in _groups() for _, terms in groups for t in terms}
