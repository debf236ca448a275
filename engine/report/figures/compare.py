"""Figures that put results side by side: searches, and the rows of the paper's tables beside its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.report.figures.theme import (
    COLOR,
    dots,
    is_wide,
    note,
    place,
    rounded,
    sheet,
    tag,
    themed,
)
from engine.report.measures import Group
from engine.report.run import Array
from engine.report.words import pm

COLORS = ("task3", "task6", "task2", "task4", "task7", "task5", "task1", "task0")
"""Of groups and series, in turn."""
KEY = 20
"""Height of a group's line in the key, and of a row of final fitness."""


def color(group: int) -> str:
    """A group's colour."""
    return COLORS[group % len(COLORS)]


def _short(label: str, *, wide: bool) -> str:
    """A label that fits its line; the tables have all of it."""
    room = 110 if wide else 44
    return label if len(label) <= room else label[: room - 1] + "…"


@themed
def curves(groups: Sequence[Group], width: float) -> Figure:
    """Best so far over members: every run faint, each group's mean with a band of one sd."""
    wide = is_wide(width)
    plot = 300 if wide else 230
    figure = sheet(width, 20 + plot + 52 + KEY * len(groups))
    axes = place(figure, 44, 16, width - 56, plot, xlabel="members trained")
    known = np.concatenate([c for g in groups for c in g.curves])
    low, high = float(np.nanmin(known)), float(np.nanmax(known))
    pad = max(0.06 * (high - low), 0.005)
    longest = max(len(c) for g in groups for c in g.curves)
    axes.set(xlim=(0.5, longest + 1), ylim=(low - pad, high + pad))
    for i, group in enumerate(groups):
        mean, sd = group.band
        ink = COLOR[color(i)]
        if np.nanmax(sd, initial=0) > 0:
            at = np.arange(len(mean) + 1) + 1
            edges = (np.clip(edge, *axes.get_ylim()) for edge in (mean - sd, mean + sd))
            below, above = (np.append(edge, edge[-1]) for edge in edges)
            axes.fill_between(at, below, above, step="post", color=ink, alpha=0.16)
        for curve in group.curves:
            _climb(axes, curve, color=ink, lw=1, alpha=0.35)
        if len(group.curves) == 1:
            mean = group.curves[0]
        _climb(axes, mean, color=ink, lw=2.4)
        y = 88 + plot + KEY * (i - 0.2)
        last = mean[~np.isnan(mean)][-1:]
        note(figure, 4, y, "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 2, color(i))
        said = f"{last[0]:.3f}" if len(last) else "none"
        note(figure, 32, y, said, color(i), weight="bold", size=12)
        note(figure, 76, y, _short(group.label, wide=wide), size=12 if wide else 11)
    axes.xaxis.set_major_locator(rounded(10 if wide else 5, whole=True))
    axes.yaxis.set_major_locator(rounded(6))
    return figure


def _climb(axes: Axes, curve: Array, **style: Any) -> None:
    """Steps from the first member with a fitness on; only where they rise, and at the end."""
    at = np.flatnonzero(~np.isnan(curve))
    if len(at):
        values = curve[at]
        kept = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
        xs, ys = np.append(at[kept] + 1, at[-1] + 2), np.append(values[kept], values[-1])
        axes.step(xs, ys, where="post", **style)


@themed
def final(groups: Sequence[Group], width: float) -> Figure:
    """Fitness with fresh seeds: a row a group, the best losses beside random ones and the untrained network."""
    wide = is_wide(width)
    tall = KEY * 4.2 * len(groups)
    figure = sheet(width, tall + 46)
    left, right = (110, 112) if wide else (84, 90)
    axes = place(figure, left, 6, width - left - right, tall, xlabel="fitness with fresh seeds")
    rows_axis(axes, tall / KEY - 0.5, count=6 if wide else 3)
    for i, group in enumerate(groups):
        top = 6 + KEY * 4.2 * i
        note(figure, 0, top + 10, _short(group.label, wide=wide), color(i), weight="bold", size=12)
        for k, key in enumerate(("best", "random", "untrained")):
            y = top + KEY * (k + 1.5)
            note(figure, left - 10, y, key if k == 2 else f"{key} loss", ha="right")
            if (s := group.side(key)) is None:
                note(figure, left, y, "not measured")
                continue
            ink = color(i) if k == 0 else key
            spread_row(axes, (y - 6) / KEY - 0.5, s.mean, s.sd, s.values[:50], color=ink)
            weight = "normal" if k else "bold"
            note(figure, width, y, pm(s.mean, s.sd), ink, ha="right", weight=weight)
    return figure


def rows_axis(axes: Axes, last: float, *, count: int) -> None:
    """A plot of rows, the first at height 0 and on top, ruled at round values."""
    axes.set_ylim(last, -0.5)
    axes.set_yticks([])
    axes.use_sticky_edges = False
    axes.margins(x=0.06)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(rounded(count))


def spread_row(
    axes: Axes,
    row: float,
    mean: float,
    sd: float | None,
    values: Sequence[float],
    *,
    color: str,
    title: str = "",
) -> None:
    """One sd as a bar, the mean as a mark, every value as a dot."""
    ink = COLOR[color]
    if sd:
        (bar,) = axes.barh(row, 2 * sd, 0.36, mean - sd, color=ink, alpha=0.28)
        tag(bar, title)
    if values:
        dots(axes, [(value, row) for value in values], color=color, size=4.5, alpha=0.7)
    axes.plot(mean, row, "|", ms=15, mew=3, color=ink)
