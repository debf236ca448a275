"""Figures of losses: heat maps of their weights (the paper's Figs. 3 and 7), weights over the search (6 and 8)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from engine.objective.terms import (
    BY_NAME,
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
    shade,
    sheet,
    tag,
    themed,
)
from engine.report.importance import Importance
from engine.report.measures import fittest_means, lineage
from engine.report.run import Array, Run, fitness_of
from engine.report.words import DISTILLED, MODALITY_LABELS, TASK_LABELS
from engine.search.samplers import Trial

TASK_SHORT = ("Shuffle", "Backw.", "Align", "Predict", "Recon.", "Color", "Cross", "Embed")
LETTERS = {t.task: t.letter for t in TERMS}
MODALITY_COLORS = {"rgb": "task4", "grey": "grey", "flow": "flow", "audio": "audio"}
TASK_COLORS = {task: f"task{i}" for i, task in enumerate(TASK_LABELS)}
MOMENTS = 6
"""Heat maps of Fig. 3."""
ROW, GAP = 15, 7
"""Fig. 3 by term: height of a row, and space between groups of rows."""
BAR = 17
"""Height of a term's row where importance is drawn."""
Group = tuple[str, tuple[Term, ...]]
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


def _grid(axes: Axes, rows: Sequence[str], columns: Sequence[str], *, size: float) -> None:
    """Names of rows at the left and of columns above; a cell is 1 by 1."""
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0))
    axes.grid(False)
    axes.xaxis.tick_top()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, size=size)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows, size=size)
    axes.tick_params(length=0, pad=4)


@themed
def loss(run: Run, width: float) -> Figure:
    """Fig. 7: the best loss, one square a term: modality by task, and modality by distilled layer."""
    wide = is_wide(width)
    assert run.weights is not None
    cell, left = (52, 58) if wide else (38, 45)
    figure = sheet(width, 40 + 4 * cell + (8 if wide else 100 + 3 * cell))
    x, y = (left + 8 * cell + 72, 40) if wide else (left, 96 + 4 * cell)
    heading = 11 if wide else 9
    tasks = place(figure, left, 40, 8 * cell, 4 * cell)
    layers = place(figure, x, y, NUM_LAYERS * cell, 3 * cell)
    _grid(tasks, [MODALITY_LABELS[m] for m in MODALITIES], TASK_SHORT, size=heading)
    names = ["stem", *map(str, range(1, NUM_LAYERS))]
    _grid(layers, [MODALITY_LABELS[m] for m in DISTILLED], names, size=heading)
    note(figure, left, 9, "Tasks", "ink", weight="bold", size=12)
    note(figure, x, y - 31, "Distillation into RGB, by layer", "ink", weight="bold", size=12)
    drawn = {step.term for step in lineage(run)}
    taken = {_cell_of(t) for t in TERMS if t.layer is None}
    for row, column in np.ndindex(len(MODALITIES), len(TASK_LABELS)):
        if (row, column) not in taken:
            tasks.plot(column + 0.5, row + 0.5, "o", ms=4, mew=0, color=COLOR["rule"])
    for term in TERMS:
        axes, weight = tasks if term.layer is None else layers, run.weights[term.name]
        _square(axes, term, weight, cell=cell, radius=5)
        _letters(axes, term, weight, cell=cell, marked=term.name in drawn)
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
    letters = [MODALITY_LETTERS[m] for m in (*MODALITIES, *DISTILLED)]
    for i, (number, best) in enumerate(shown):
        x, y = (i % columns) * (each + 12) + 14, (i // columns) * (tall + 20)
        note(figure, x, y + 9, f"trial {number:,}", "ink", weight="bold", size=12)
        note(figure, x + each - 14, y + 9, f"{fitness_of(best):.3f}", ha="right")
        above = place(figure, x, y + 34, 8 * cell, 4 * cell)
        below = place(figure, x, y + 34 + 4 * cell + 20, NUM_LAYERS * cell, 3 * cell)
        _grid(above, letters[: len(MODALITIES)], [LETTERS[t] for t in TASK_LABELS], size=9)
        _grid(below, letters[len(MODALITIES) :], [str(k) for k in range(NUM_LAYERS)], size=9)
        for term in TERMS:
            axes = above if term.layer is None else below
            _square(axes, term, best.weights[term.name], cell=cell, radius=2)
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
    note(
        figure,
        left + 124,
        below + 22,
        "\N{BLACK DOWN-POINTING SMALL TRIANGLE} a new best is result",
    )
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
    last = run.trials[-1].number + 0.5
    turn = -np.inf if run.turn is None else run.turn + 0.5
    now = int(np.searchsorted(at, turn))
    at, values = np.append(at, last), np.append(values, values[-1])
    if now:
        axes.step(
            np.append(at[:now], turn),
            np.append(values[:now], values[now - 1]),
            where="post",
            color=COLOR[color],
            lw=max(1, lw - 0.7),
            alpha=0.4 * alpha,
        )
        at, values = np.insert(at[now:], 0, turn), np.insert(values[now:], 0, values[now - 1])
    axes.step(at, values, where="post", color=COLOR[color], lw=lw, alpha=alpha)


def _weight_axis(axes: Axes, *, named: bool = True, count: int = 2) -> None:
    """From 0 to 1, with a dashed line at 0.5: where a weight that does not matter comes to lie."""
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, count + 1))
    axes.axhline(0.5, color=COLOR["muted"], lw=1, ls="--", alpha=0.7)
    axes.tick_params(labelleft=named)


@themed
def tasks(run: Run, width: float) -> Figure:
    """Fig. 8: each task's weight over the search, the mean over the fittest members and over modalities."""
    wide = is_wide(width)
    figure = sheet(width, 370 if wide else 330)
    axes = place(figure, 36, 28, width - (194 if wide else 170), 296 if wide else 256)
    over_trials(axes, run, count=8 if wide else 4, label=True)
    _weight_axis(axes, count=4)
    at, means = fittest_means(run)
    labels = []
    for task in TASK_LABELS:
        curve = means[:, [i for i, t in enumerate(TERMS) if t.task == task]].mean(axis=1)
        _follow(axes, run, at, curve, color=TASK_COLORS[task])
        labels.append((float(curve[-1]), f"{curve[-1]:.2f}", TASK_COLORS[task]))
    size = 12 if wide else 11
    heights = ends(axes, labels, gap=17 if wide else 16, lead=10, weight="bold", size=size)
    for label, (_, _, color), y in zip(TASK_LABELS.values(), labels, heights, strict=True):
        bottom = 324 if wide else 284
        note(
            figure, width - (107 if wide else 85), bottom - y, label, color, size=size - (not wide)
        )
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
        column, row = i % columns, i // columns
        axes = place(
            figure, column * each + 28, 26 + row * (tall + 60), each - 46, tall, title=label
        )
        over_trials(axes, run, count=3, name="trial" if row == lines - 1 else "")
        _weight_axis(axes, named=column == 0)
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
    _weight_axis(best, count=4)
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
        _weight_axis(axes, named=i == 0 or not wide)
        labels = []
        for k in range(NUM_LAYERS):
            column = means[:, TERM_NAMES.index(f"distill/{m}@{k}")]
            _follow(axes, run, at, column, color=m, lw=1.2 + 0.3 * k, alpha=0.4 + 0.15 * k)
            labels.append((float(column[-1]), str(k), m))
        ends(axes, labels, gap=12)
    return figure


@themed
def importance(result: Importance, width: float) -> Figure:
    """Every term's share of the variance of fitness beside its weight in the best loss."""
    wide = is_wide(width)
    order = sorted(TERM_NAMES, key=lambda n: (-result.share[n], TERM_NAMES.index(n)))
    left, middle = (160, 70) if wide else (104, 44)
    each = (width - left - middle - (44 if wide else 30)) / 2
    tall = BAR * len(order)
    figure = sheet(width, 40 + tall)
    top = max(*result.share.values(), result.chance, 1e-9)
    heads = ("share of variance", "weight in the best loss") if wide else ("share", "weight")
    bars = []
    for x, limit, head in ((left, top, heads[0]), (left + each + middle, 1, heads[1])):
        axes = place(
            figure, x, 34, each, tall, xlim=(0, limit), ylim=(len(order) - 0.5, -0.5), xticks=[]
        )
        axes.set_yticks([])
        note(figure, x, 9, head, "ink", weight="bold", size=12)
        bars.append(axes)
    for row, name in enumerate(order):
        share, weight = result.share[name], result.weight[name]
        color = "accent" if share > result.chance else "muted"
        y = 34 + (row + 0.5) * BAR
        if wide:
            note(figure, 0, y, BY_NAME[name].code, "ink", weight="bold", size=12)
        note(figure, 36 if wide else 0, y, name, size=11 if wide else 10)
        sign = "+" if result.direction[name] >= 0 else "\N{MINUS SIGN}"
        say = f"{name}: share {share:.3f}, weight {weight:.2f}"
        text = f"{100 * share:.1f} % {sign}" if wide else f"{100 * share:.0f} {sign}"
        for axes, value, ink, label in (
            (bars[0], share, color, text),
            (bars[1], weight, "task4", f"{weight:.2f}"),
        ):
            (bar,) = axes.barh(
                row, value, 0.6, color=COLOR[ink], alpha=0.55 if ink == "muted" else 1
            )
            tag(bar, say)
            said = "accent" if ink == "accent" else "muted"
            beside(axes, label, (value, row), (5, 0), color=said, size=10)
    bars[0].axvline(result.chance, color=COLOR["random"], lw=1.4, ls="--")
    style: dict[str, Any] = {"units": ("data", "axes fraction"), "ha": "center", "size": 10}
    beside(bars[0], "chance", (result.chance, 1), (0, 9), color="random", **style)
    return figure
