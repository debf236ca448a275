"""Figures of losses: heat maps of their weights (the paper's Figs. 3 and 7), weights over the search (6 and 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from engine.objective.terms import (
    MODALITIES,
    MODALITY_LETTERS,
    NUM_LAYERS,
    TERM_NAMES,
    TERMS,
    Term,
)
from engine.report.figures.search import over_trials
from engine.report.figures.theme import (
    COLOR,
    RAMP,
    beside,
    ends,
    is_wide,
    note,
    place,
    rows_axis,
    shade,
    sheet,
    tag,
    themed,
)
from engine.report.measures import fittest_means, lineage
from engine.report.run import Array, Run, fitness_of
from engine.report.words import DISTILLED, MODALITY_LABELS, TASK_LABELS
from engine.search.effects import Effect, Effects
from engine.search.members import Trial
from engine.search.surrogate import GROUPS

TASK_SHORT = ("Shuffle", "Backw.", "Align", "Predict", "Recon.", "Color", "Cross", "Embed")
LETTERS = {t.task: t.letter for t in TERMS}
MODALITY_COLORS = {"rgb": "task4", "grey": "grey", "flow": "flow", "audio": "audio"}
TASK_COLORS = {task: f"task{i}" for i, task in enumerate(TASK_LABELS)}
MOMENTS = 6
"""Heat maps of Fig. 3."""
ROW, GAP = 15, 7
"""Fig. 3 by term: height of a row, and space between groups of rows."""
BAR, LABELS = 16, 122
"""Effects: height of a row, and width of its name."""
Group = tuple[str, tuple[Term, ...]]
"""Terms that stand together, under a name."""
TASK_GROUPS: tuple[Group, ...] = tuple(
    (label, tuple(t for t in TERMS if t.task == task)) for task, label in TASK_LABELS.items()
)
DISTILL_GROUPS: tuple[Group, ...] = tuple(
    (f"Distil {m}", tuple(t for t in TERMS if t.task == "distill" and t.modality == m))
    for m in DISTILLED
)


def _key(figure: Figure, x: float, y: float) -> None:
    """The ramp from 0 to 1."""
    note(figure, x, y, "weight")
    note(figure, x + 52, y, "0", ha="right")
    axes = place(figure, x + 57, y - 6, 6 * len(RAMP), 12, xlim=(0, len(RAMP)), ylim=(0, 1))
    axes.set_axis_off()
    colors = [COLOR[f"q{i}"] for i in range(len(RAMP))]
    axes.bar(np.arange(len(RAMP)), 1, 1.05, align="edge", color=colors)
    note(figure, x + 189, y, "1")


def _cell_of(term: Term) -> tuple[int, int]:
    """A term's row and column among the tasks, or among the distilled layers."""
    if term.layer is None:
        return MODALITIES.index(term.modality), tuple(TASK_LABELS).index(term.task)
    return DISTILLED.index(term.modality), term.layer


def _maps(
    figure: Figure,
    weights: Mapping[str, float],
    names: Sequence[Sequence[str]],
    *,
    at: tuple[tuple[float, float], tuple[float, float]],
    cell: float,
    size: float,
    radius: float,
) -> tuple[Axes, Axes]:
    """A square a term: of the tasks by modality, and of the distilled layers by modality.

    ``names`` are those of rows and columns of the first map and of the second, ``at`` their places.
    """
    maps = []
    for (x, y), rows, columns in zip(at, names[::2], names[1::2], strict=True):
        axes = place(figure, x, y, len(columns) * cell, len(rows) * cell)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
        axes.grid(False)
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, size=size)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows, size=size)
        axes.tick_params(length=0, pad=4)
        maps.append(axes)
    for term in TERMS:
        axes = maps[term.layer is not None]
        _square(axes, term, weights[term.name], cell=cell, radius=radius)
    return maps[0], maps[1]


@themed
def loss(run: Run, width: float) -> Figure:
    """Fig. 7: the best loss, one square a term: modality by task, and modality by distilled layer."""
    wide = is_wide(width)
    assert run.weights is not None
    cell, left = (52, 58) if wide else (38, 45)
    figure = sheet(width, 40 + 4 * cell + (8 if wide else 100 + 3 * cell))
    x, y = (left + 8 * cell + 72, 40) if wide else (left, 96 + 4 * cell)
    rows = [[MODALITY_LABELS[m] for m in group] for group in (MODALITIES, DISTILLED)]
    names = (rows[0], TASK_SHORT, rows[1], ["stem", *map(str, range(1, NUM_LAYERS))])
    look: dict[str, Any] = {"cell": cell, "size": 11 if wide else 9, "radius": 5}
    tasks, layers = _maps(figure, run.weights, names, at=((left, 40), (x, y)), **look)
    note(figure, left, 9, "Tasks", "ink", weight="bold", size=12)
    note(figure, x, y - 31, "Distillation into RGB, by layer", "ink", weight="bold", size=12)
    drawn = {step.term for step in lineage(run)}
    taken = {_cell_of(t) for t in TERMS if t.layer is None}
    for row, column in np.ndindex(len(MODALITIES), len(TASK_LABELS)):
        if (row, column) not in taken:
            tasks.plot(column + 0.5, row + 0.5, "o", ms=4, mew=0, color=COLOR["rule"])
    for term in TERMS:
        axes = tasks if term.layer is None else layers
        _letters(axes, term, run.weights[term.name], cell=cell, marked=term.name in drawn)
    _key(figure, x, y + 3 * cell + 26)
    return figure


def _square(axes: Axes, term: Term, weight: float, *, cell: float, radius: float) -> None:
    """A term's square on its shade; ``cell`` and ``radius`` are in pixels."""
    row, column = _cell_of(term)
    gap = 3 / cell if radius > 2 else 1 / cell
    corner, side = (column + gap / 2, row + gap / 2), 1 - gap
    style = f"round,pad=0,rounding_size={radius / cell}"
    square = FancyBboxPatch(corner, side, side, boxstyle=style, color=shade(weight)[0])
    tag(axes.add_artist(square), f"{term.name} {weight:.3f}", key=f"b:{term.name}")


def _letters(axes: Axes, term: Term, weight: float, *, cell: float, marked: bool) -> None:
    """A term's code and weight on its square, which the page's script may change."""
    row, column = _cell_of(term)
    letters = shade(weight)[1]
    look: dict[str, Any] = {"ha": "center", "va": "center_baseline", "color": letters}
    large, small = (14, 11) if cell > 40 else (11, 9)
    code = axes.text(column + 0.5, row + 0.39, term.code, size=large, weight="bold", **look)
    value = axes.text(column + 0.5, row + 0.7, f"{weight:.2f}", size=small, **look)
    tag(code, key=f"c:{term.name}")
    tag(value, key=f"v:{term.name}")
    if marked:
        corner = (column + 1 - 8 / cell, row + 8 / cell)
        tag(axes.plot(*corner, "o", ms=5, mew=0, color=letters)[0], key="corner")


def moments(run: Run) -> list[tuple[int, Trial]]:
    """Trials spread evenly from the first with a fitness to the last, each with the best so far."""
    first, last = run.improvements[0].number, run.trials[-1].number
    at = {round(first + k * (last - first) / (MOMENTS - 1)) for k in range(MOMENTS)}
    return [(k, [t for t in run.improvements if t.number <= k][-1]) for k in sorted(at)]


@themed
def rounds(run: Run, width: float) -> Figure:
    """Fig. 3: the squares of Fig. 7, of the best loss so far at a few moments of the search."""
    columns = MOMENTS if is_wide(width) else 2
    shown = moments(run)
    each = (width - 12 * (columns - 1)) / columns
    cell = (each - 14) / len(TASK_LABELS)
    tall = 34 + 7 * cell + 20
    lines = -(-len(shown) // columns)
    figure = sheet(width, lines * (tall + 20) + 22)
    rows = [[MODALITY_LETTERS[m] for m in group] for group in (MODALITIES, DISTILLED)]
    names = (rows[0], [LETTERS[t] for t in TASK_LABELS], rows[1], [*map(str, range(NUM_LAYERS))])
    for i, (number, best) in enumerate(shown):
        x, y = (i % columns) * (each + 12) + 14, (i // columns) * (tall + 20)
        note(figure, x, y + 9, f"trial {number:,}", "ink", weight="bold", size=12)
        note(figure, x + each - 14, y + 9, f"{fitness_of(best):.3f}", ha="right")
        at = ((x, y + 34), (x, y + 54 + 4 * cell))
        _maps(figure, best.weights, names, at=at, cell=cell, size=9, radius=2)
    _key(figure, 0, lines * (tall + 20) + 12)
    return figure


def _tall(groups: Sequence[Group]) -> float:
    return sum(len(terms) for _, terms in groups) * ROW + GAP * (len(groups) - 1)


@themed
def weights(run: Run, width: float) -> Figure:
    """Fig. 3 whole: the weights of the best loss so far at every trial, one row a term."""
    wide = is_wide(width)
    first, second = _tall(TASK_GROUPS), _tall(DISTILL_GROUPS)
    panel = (width - 44) / 2 if wide else width
    left, top = (panel + 44, 14) if wide else (0, 14 + first + 58)
    below = top + second + (78 if wide else 62)
    figure = sheet(width, 14 + first + 44 if wide else below + 30)
    _rows(figure, run, TASK_GROUPS, left=0, top=14, width=panel)
    _rows(figure, run, DISTILL_GROUPS, left=left, top=top, width=panel)
    _key(figure, left + 124, below)
    mark = "\N{BLACK DOWN-POINTING SMALL TRIANGLE}"
    note(figure, left + 124, below + 22, f"{mark} a new best")
    return figure


def _rows(
    figure: Figure, run: Run, groups: Sequence[Group], *, left: float, top: float, width: float
) -> None:
    tall = _tall(groups)
    axes = place(figure, left + 124, top, width - 156, tall)
    over_trials(axes, run, count=5)
    axes.set_ylim(tall, 0)
    axes.grid(False)
    y, ticks = 0, {}
    for label, terms in groups:
        note(figure, left, top + y + ROW / 2, label, "ink", size=12)
        for term in terms:
            last = _row(axes, run, term, y)
            note(figure, left + width - 26, top + y + ROW / 2, f"{last:.2f}")
            ticks[y + ROW / 2] = term.code
            y += ROW
        y += GAP
    axes.set_yticks(list(ticks), list(ticks.values()), va="center_baseline")
    changes = [t.number - 0.5 for t in run.improvements]
    axes.plot(changes, [-6] * len(changes), "v", ms=6, mew=0, color=COLOR["ink"], clip_on=False)


def _row(axes: Axes, run: Run, term: Term, y: float) -> float:
    """One term: a box for every stretch of trials over which its weight stays; gives the last."""
    best = run.improvements
    edges = [*(t.number - 0.5 for t in best), axes.get_xlim()[1]]
    values = [t.weights[term.name] for t in best]
    start = 0
    for i, weight in enumerate(values):
        if i + 1 < len(values) and values[i + 1] == weight:
            continue
        span = edges[i + 1] - edges[start]
        box = Rectangle((edges[start], y), span, ROW - 1, color=shade(weight)[0], lw=0.3)
        tag(axes.add_artist(box), f"{term.name} {weight:.2f} from trial {best[start].number}")
        start = i + 1
    return values[-1]


def _follow(
    axes: Axes, run: Run, at: Array, values: Array, *, color: str, lw: float = 2, alpha: float = 1
) -> None:
    """A weight over the search, faint while the population is still being drawn at random."""
    turn = -np.inf if run.turn is None else run.turn + 0.5
    now = int(np.searchsorted(at, turn))
    at, values = np.append(at, run.trials[-1].number + 0.5), np.append(values, values[-1])
    style: dict[str, Any] = {"where": "post", "color": COLOR[color]}
    if now:
        before = np.append(at[:now], turn), np.append(values[:now], values[now - 1])
        axes.step(*before, lw=max(1, lw - 0.7), alpha=0.4 * alpha, **style)
        at, values = np.insert(at[now:], 0, turn), np.insert(values[now:], 0, values[now - 1])
    axes.step(at, values, lw=lw, alpha=alpha, **style)


def _weight_axis(axes: Axes, run: Run, *, named: bool = True, count: int = 2) -> None:
    """From 0 to 1, with a dashed line at 0.5 where, drawn uniformly, a weight that does not matter comes to lie."""
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, count + 1))
    if not run.sparse:
        axes.axhline(0.5, color=COLOR["muted"], lw=1, ls="--", alpha=0.7)
    axes.tick_params(labelleft=named)


@themed
def tasks(run: Run, width: float) -> Figure:
    """Fig. 8: each task's weight over the search, the mean over the fittest members and over modalities."""
    wide = is_wide(width)
    figure = sheet(width, 370 if wide else 330)
    axes = place(figure, 36, 28, width - (194 if wide else 170), 296 if wide else 256)
    over_trials(axes, run, count=8 if wide else 4, label=True)
    _weight_axis(axes, run, count=4)
    at, means = fittest_means(run)
    labels = []
    for task in TASK_LABELS:
        curve = means[:, [i for i, t in enumerate(TERMS) if t.task == task]].mean(axis=1)
        _follow(axes, run, at, curve, color=TASK_COLORS[task])
        labels.append((float(curve[-1]), f"{curve[-1]:.2f}", TASK_COLORS[task]))
    size = 12 if wide else 11
    heights = ends(axes, labels, gap=17 if wide else 16, lead=10, weight="bold", size=size)
    x, bottom = (width - 107, 324) if wide else (width - 85, 284)
    for label, (_, _, color), y in zip(TASK_LABELS.values(), labels, heights, strict=True):
        note(figure, x, bottom - y, label, color, size=size - (not wide))
    return figure


@themed
def modalities(run: Run, width: float) -> Figure:
    """Fig. 8 by modality: a panel a task, and in it a curve a modality that has the task."""
    columns, tall = (4, 118) if is_wide(width) else (2, 96)
    each = (width - 8) / columns
    lines = -(-len(TASK_LABELS) // columns)
    figure = sheet(width, lines * (tall + 60) + 34)
    at, means = fittest_means(run)
    for i, (task, label) in enumerate(TASK_LABELS.items()):
        row, column = divmod(i, columns)
        x, y = column * each + 28, 26 + row * (tall + 60)
        axes = place(figure, x, y, each - 46, tall, title=label)
        over_trials(axes, run, count=3, name="trial" if row == lines - 1 else "")
        _weight_axis(axes, run, named=column == 0)
        labels = []
        for j, term in enumerate(TERMS):
            if term.task == task:
                color = MODALITY_COLORS[term.modality]
                _follow(axes, run, at, means[:, j], color=color, lw=1.8)
                labels.append((float(means[-1, j]), MODALITY_LETTERS[term.modality], color))
        ends(axes, labels, gap=12, weight="bold")
    for i, (m, label) in enumerate(MODALITY_LABELS.items()):
        x, color = i * 84, MODALITY_COLORS[m]
        note(figure, 28 + x, lines * (tall + 60) + 26, MODALITY_LETTERS[m], color, weight="bold")
        note(figure, 42 + x, lines * (tall + 60) + 26, label)
    return figure


@themed
def layers(run: Run, width: float) -> Figure:
    """Fig. 6: distillation weights by layer, (a) of the best loss and (b) over the search."""
    wide = is_wide(width)
    assert run.weights is not None
    figure = sheet(width, 294 if wide else 838)
    left, top = (322.0, 0) if wide else (0.0, 306)
    for x, y, letter, what in (
        (0.0, 10, "a", "the best loss, by layer"),
        (left, top + 10, "b", "mean of the fittest so far, by layer 0 to 4"),
    ):
        note(figure, x, y, letter, "ink", weight="bold", size=13)
        note(figure, x + 16, y, what, "ink", size=12)
    best = place(figure, 36, 46, 200 if wide else width - 96, 198, xlabel="layer (0 = stem)")
    _weight_axis(best, run, count=4)
    labels = []
    for m in DISTILLED:
        values = [run.weights[f"distill/{m}@{k}"] for k in range(NUM_LAYERS)]
        best.plot(values, "o-", color=COLOR[m], lw=2.2, ms=7, mew=0, clip_on=False)
        labels.append((values[-1], MODALITY_LABELS[m], m))
    best.set_xticks(range(NUM_LAYERS))
    ends(best, labels, gap=16, weight="bold", size=12)
    at, means = fittest_means(run)
    each = (width - left - 24) / 3
    for i, m in enumerate(DISTILLED):
        x, y = (left + 28 + i * each, 46) if wide else (36, top + 46 + i * 166)
        size = (each - 26, 198) if wide else (width - 60, 104)
        axes = place(figure, x, y, *size)
        axes.set_title(MODALITY_LABELS[m], color=COLOR[m])
        over_trials(axes, run, count=3, name="trial" if wide or i == 2 else "")
        _weight_axis(axes, run, named=i == 0 or not wide)
        labels = []
        for k in range(NUM_LAYERS):
            column = means[:, TERM_NAMES.index(f"distill/{m}@{k}")]
            _follow(axes, run, at, column, color=m, lw=1.2 + 0.3 * k, alpha=0.4 + 0.15 * k)
            labels.append((float(column[-1]), str(k), m))
        ends(axes, labels, gap=12)
    return figure


@themed
def effects(found: Effects, width: float) -> Figure:
    """Every term's effect with its interval, below its task's (Fig. 8) or its modality's distillation (Fig. 6)."""
    wide = is_wide(width)
    panel = (width - 36) / 2 if wide else width
    shown = [e for each in (found.terms, found.groups) for e in each.values()]
    limits = min(0.0, *(e.low for e in shown)), max(0.0, *(e.high for e in shown))
    heights = [
        sum(1 + len(t) for _, t in g) * BAR + GAP * len(g) for g in (TASK_GROUPS, DISTILL_GROUPS)
    ]
    figure = sheet(width, 52 + (max(heights) if wide else sum(heights) + 64))
    for i, (groups, tall) in enumerate(zip((TASK_GROUPS, DISTILL_GROUPS), heights, strict=True)):
        left, top = (i * (panel + 36), 30) if wide else (0, 30 + i * (heights[0] + 64))
        heads = ("Tasks", "Distillation into RGB, by layer")
        note(figure, left, top - 21, heads[i], "ink", weight="bold", size=12)
        axes = place(figure, left + LABELS, top, panel - LABELS - 6, tall, xlim=limits)
        rows_axis(axes, tall, count=4)
        axes.set_ylim(tall, 0)
        axes.axvline(0, color=COLOR["muted"], lw=1)
        y: float = GAP / 2
        for label, terms in groups:
            group = GROUPS[TERMS.index(terms[0])]
            note(figure, left, top + y + BAR / 2, label, "ink", weight="bold")
            _interval(axes, y + BAR / 2, found.groups.get(group), label, bold=True)
            for term in terms:
                y += BAR
                note(figure, left, top + y + BAR / 2, term.name, size=10)
                _interval(axes, y + BAR / 2, found.terms.get(term.name), term.name)
            y += BAR + GAP
    return figure


def _interval(
    axes: Axes, y: float, effect: Effect | None, name: str, *, bold: bool = False
) -> None:
    """A dot at the mean and a line over the interval, in colour where that excludes 0."""
    if effect is None:
        beside(axes, "not tried", (0, y), (4, 0), size=10)
        return
    color = COLOR[{1: "best", -1: "random", 0: "muted"}[effect.sign]]
    axes.plot(
        [effect.low, effect.high],
        [y, y],
        lw=4 if bold else 1.8,
        color=color,
        alpha=0.5 + 0.2 * abs(effect.sign),
    )
    dot = axes.plot(effect.mean, y, "o", ms=6.5 if bold else 5, mew=0, color=color)[0]
    tag(dot, f"{name}: {effect.mean:+.3f}, {effect.low:+.3f} to {effect.high:+.3f}")
