"""Figures of a search: fitness over the trials, the best member's lineage, time, speed, the label-free fitness."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.objective.terms import BY_NAME
from engine.report.figures.theme import (
    COLOR,
    beside,
    dots,
    ends,
    is_wide,
    note,
    place,
    rounded,
    sheet,
    tag,
    themed,
)
from engine.report.measures import Agreement, Step, lineage, stat
from engine.report.run import Run, fitness_of
from engine.report.words import TIME_LABELS, duration, pm, time_parts

LEVELS = (
    ("best", "best loss, fresh seeds"),
    ("random", "random losses, fresh seeds"),
    ("untrained", "untrained network"),
)
"""Keys of the summary that are also names of colours, and what they are called."""
ROWS = 25
"""Steps of a lineage that are drawn: the last ones."""
STEP = 22
"""Height of a row of the lineage."""
MANY = 300
"""From this many trials on, marks are small and let others shine through."""
TIME_COLORS = dict(
    zip(
        TIME_LABELS,
        ("task6", "task1", "task3", "task2", "task4", "task5", "task7", "task0"),
        strict=True,
    )
)


def over_trials(
    axes: Axes, run: Run, *, count: int, label: bool = False, name: str = "trial"
) -> None:
    """The axis of trials, with a line where the initial population ends if children follow it."""
    axes.set_xlim(run.trials[0].number - 0.5, run.trials[-1].number + 0.5)
    axes.xaxis.set_major_locator(rounded(count, whole=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(name)
    if run.turn is None:
        return
    turn = run.turn + 0.5
    axes.axvline(
        turn,
        ymax=1.05 if label else 1,
        color=COLOR["muted"],
        lw=1,
        ls="--",
        alpha=0.7,
        clip_on=False,
    )
    low, high = axes.get_xlim()
    before = (turn - low) / (high - low) * axes.bbox.width
    after, units = "evolution" if run.evolved else "search", ("data", "axes fraction")
    if label and before > 112:
        beside(axes, "initial population", (turn, 1), (-6, 9), units=units, ha="right")
    if label and axes.bbox.width - before > 62:
        beside(axes, after, (turn, 1), (6, 9), units=units)


@themed
def fitness(run: Run, width: float) -> Figure:
    """Every member's fitness over the search, the best so far, and the levels it is to be judged by."""
    wide = is_wide(width)
    known = [(k, n, s) for k, n in LEVELS if (s := stat(run.summary.get(k))) is not None]
    top = fitness_of(run.improvements[-1])
    levels = [(top, f"{top:.3f}", "ink", "best so far in the search")]
    levels += [(s.mean, pm(s.mean, s.sd), key, name) for key, name, s in known]
    under = 44 if wide else 54 + 22 * len(levels)
    figure = sheet(width, 56 + (290 if wide else 230) + under)
    axes = place(figure, 44, 56, width - (244 if wide else 52), 290 if wide else 230)
    for key, _, s in known:
        if s.sd is not None:
            axes.axhspan(s.mean - s.sd, s.mean + s.sd, color=COLOR[key], alpha=0.16)
        axes.axhline(s.mean, color=COLOR[key], lw=1.6)
    _members(axes, run)
    over_trials(axes, run, count=10 if wide else 5, label=True)
    axes.yaxis.set_major_locator(rounded(6))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=4)
    if wide:
        named = [(value, text, key) for value, text, key, _ in levels]
        heights = ends(axes, named, gap=36, lead=14, weight="bold", size=13)
        for (*_, name), height in zip(levels, heights, strict=True):
            note(figure, width - 181, 346 - height + 15, name)
        return figure
    for i, (_, text, key, name) in enumerate(levels):
        y = 56 + 230 + 54 + 22 * i + 8
        note(figure, 44, y, "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 2, key)
        note(figure, 72, y, text, key, weight="bold", size=12)
        note(figure, 172, y, name, size=12)
    return figure


def _members(axes: Axes, run: Run) -> None:
    """Best so far as steps, every member as a mark, and failed ones on the axis."""
    best = run.improvements
    at = [*(t.number for t in best), run.trials[-1].number + 0.5]
    axes.step(
        at, [fitness_of(t) for t in (*best, best[-1])], where="post", color=COLOR["ink"], lw=2
    )
    many = len(run.trials) > MANY
    first = {t.number for t in run.initial} if run.turn is not None else set[int]()
    whole = [(t.number, fitness_of(t)) for t in run.complete]
    rings = [p for p in whole if p[0] in first]
    others = [p for p in whole if p[0] not in first]
    pruned = [(t.number, t.partial) for t in run.pruned if t.partial is not None]
    if rings:
        dots(axes, rings, color="accent", size=6, many=many, ring=True, label="initial population")
    if others:
        label = "child" if run.evolved else "member"
        dots(axes, others, color="accent", size=7, many=many, label=label)
    if pruned:
        dots(axes, pruned, color="muted", size=6, many=many, marker="v", label="pruned")
    axes.margins(y=0.07)
    axes.set_ylim(*axes.get_ylim())
    if run.failed:
        floor = [(t.number, axes.get_ylim()[0]) for t in run.failed]
        style = {"marker": "x", "mew": 1.6, "clip_on": False, "zorder": 3, "label": "failed"}
        dots(axes, floor, color="failed", size=6, many=many, **style)


@themed
def ancestry(run: Run, width: float) -> Figure:
    """The mutations that led to the best member: a row each, with fitness before and after."""
    wide = is_wide(width)
    steps = lineage(run)[-ROWS:]
    left, right = (220, 60) if wide else (132, 50)
    figure = sheet(width, 24 + STEP * len(steps) + 44)
    axes = place(
        figure, left, 24, width - left - right, STEP * len(steps), xlabel="fitness", yticks=[]
    )
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(rounded(6 if wide else 3))
    note(figure, 0, 9, "trial")
    note(figure, 44, 9, "weight drawn anew")
    note(figure, width, 9, "gain", ha="right")
    for row, step in enumerate(steps):
        color = _dumbbell(axes, step, row)
        y = 24 + (row + 0.5) * STEP
        note(figure, 0, y, f"{step.trial}")
        if step.term:
            note(figure, 44, y, BY_NAME[step.term].code, "ink", weight="bold", size=12)
        if step.after is not None:
            before = f"{step.before:.2f} " if wide and step.before is not None else ""
            note(figure, 84, y, f"{before}\N{RIGHTWARDS ARROW} {step.after:.2f}")
        if step.gain is not None:
            gain = f"{step.gain:+.3f}".replace("-", "\N{MINUS SIGN}")
            note(figure, width, y, gain, color, ha="right", weight="bold", size=12)
    return figure


def _dumbbell(axes: Axes, step: Step, row: int) -> str:
    """The parent's fitness as a ring, the child's as a dot; gives their colour."""
    gain = step.gain
    color = "muted" if gain is None else "best" if gain >= 0 else "random"
    if step.fitness_after is None:
        return color
    if step.fitness_before is not None:
        pair = [step.fitness_before, step.fitness_after]
        axes.plot(pair, [row, row], color=COLOR[color], lw=3, solid_capstyle="butt")
        dots(axes, [(pair[0], row)], color=color, size=7, ring=True, mfc=COLOR["surface"])
    dots(axes, [(step.fitness_after, row)], color=color, size=8)
    return color


@themed
def zipf(agreement: Agreement, width: float) -> Figure:
    """One mark a member: k-means accuracy against the fitness that needs no labels."""
    figure = sheet(width, 332)
    axes = place(figure, 48, 26, min(width - 60, 460), 260, xlabel="zipf")
    note(figure, 48, 9, "k-means accuracy")
    dots(axes, agreement.pairs, color="accent", size=6.5, many=len(agreement.pairs) > MANY)
    axes.margins(0.06)
    axes.xaxis.set_major_locator(rounded(5))
    axes.yaxis.set_major_locator(rounded(5))
    return figure


@themed
def time(run: Run, width: float) -> Figure:
    """Where the run's time went: one bar."""
    parts = time_parts(run)
    total = sum(parts.values())
    columns = 4 if is_wide(width) else 2
    figure = sheet(width, 44 + 46 * -(-len(parts) // columns))
    axes = place(figure, 0, 0, width, 30, xlim=(0, total), ylim=(0, 1))
    axes.set_axis_off()
    start = 0.0
    for i, (part, seconds) in enumerate(parts.items()):
        share = f"{100 * seconds / total:.0f} %" if seconds / total >= 0.005 else "< 1 %"
        color = COLOR[TIME_COLORS[part]]
        (bar,) = axes.barh(0.5, max(seconds - 1.5 * total / width, 0), 1, start, color=color)
        tag(bar, f"{TIME_LABELS[part]} {duration(seconds)}, {share}")
        if seconds / total * width > 52:
            beside(axes, share, (start, 0.5), (10, 0), color="on-high", weight="bold", size=12)
        start += seconds
        left, top = (i % columns) * width / columns, 44 + 46 * (i // columns)
        place(figure, left, top + 6, 10, 10, xticks=[], yticks=[], facecolor=color)
        note(figure, left + 17, top + 11, TIME_LABELS[part], "ink", weight="bold", size=12)
        note(figure, left + 17, top + 28, f"{duration(seconds)} · {share}", size=12)
    return figure


@themed
def rates(run: Run, width: float) -> Figure:
    """Training clips a second of every member over the search, and their median."""
    points = [(t.number, t.clips_per_second) for t in run.complete if t.clips_per_second]
    figure = sheet(width, 232)
    axes = place(figure, 48, 28, width - 60, 156)
    note(figure, 0, 8, "clips/s")
    dots(axes, points, color="accent", size=6, many=len(points) > MANY)
    axes.axhline(
        float(np.median([rate for _, rate in points])), color=COLOR["ink"], lw=1.4, ls="--"
    )
    axes.set_ylim(0, 1.1 * max(rate for _, rate in points))
    axes.yaxis.set_major_locator(rounded(5))
    over_trials(axes, run, count=10 if is_wide(width) else 5)
    return figure
