"""A table as a picture: dots with one sd beside the paper's numbers, or curves over shares of the data."""

from __future__ import annotations

from collections.abc import Sequence

from engine.reporting.sketch import WIDE, Area, Box, Frame, Line, Marks, Sketch, Text, ticks
from engine.reproduce.rows import Column
from engine.reproduce.table import Entry, Table

EACH, HEAD, FOOT = 22.0, 38.0, 64.0
"""Heights in pixels of a row, of the panels' names, and of what is under the panels."""
NAMES_WIDTH = 210.0
CURVE_HEIGHT = 230.0


def figure(table: Table) -> Sketch:
    """The table's figure: curves where its rows are points of series, otherwise dots."""
    return _curves(table) if any(row.series for row in table.rows) else _dots(table)


def _limits(entries: Sequence[Entry], more: Sequence[float] = ()) -> tuple[float, float]:
    ends = [end for e in entries if e.mean is not None for end in (*e.values, *_sd_ends(e))]
    ends += [e.paper for e in entries if e.paper is not None]
    ends += more
    low, high = (min(ends), max(ends)) if ends else (0.0, 100.0)
    room = max(0.06 * (high - low), 1.0)
    return max(low - room, 0.0), min(high + room, 104.0)


def _sd_ends(e: Entry) -> tuple[float, ...]:
    return () if e.mean is None or e.sd is None else (e.mean - e.sd, e.mean + e.sd)


def _dots(table: Table) -> Sketch:
    count = max(len(table.columns), 1)
    tall = EACH * len(table.rows)
    sketch = Sketch(WIDE, HEAD + tall + FOOT)
    each = (WIDE - NAMES_WIDTH) / count
    for i, row in enumerate(table.rows):
        y = HEAD + (i + 0.5) * EACH
        if i and row.group != table.rows[i - 1].group:
            sketch.add(Line(((0, HEAD + i * EACH), (WIDE, HEAD + i * EACH)), "muted", alpha=0.5))
        bold = row.name == "evolved"
        sketch.add(Text(0, y, row.title, "best" if bold else "ink", 12, bold=bold))
    for number, column in enumerate(table.columns):
        left = NAMES_WIDTH + number * each
        _panel(sketch, table, column, left=left, width=each - 28, tall=tall)
    _key(sketch, HEAD + tall + 48, baselines=bool(table.baselines))
    return sketch


def _panel(
    sketch: Sketch, table: Table, column: Column, *, left: float, width: float, tall: float
) -> None:
    """One column's dots."""
    entries = [table.entry(row, column) for row in table.rows]
    lines = [values[column.name] for values in table.baselines.values() if column.name in values]
    frame = Frame(sketch, left, HEAD, width, tall, _limits(entries, lines))
    title, _, more = column.title.partition(" (")
    middle = left + width / 2
    sketch.add(Text(middle, 8, f"{title}, %", "ink", 12, "middle", bold=True))
    if more:
        sketch.add(Text(middle, 24, f"({more}", "muted", 11, "middle"))
    for value in ticks(*frame.xlim, count=4):
        x = frame.x(value)
        sketch.add(Line(((x, frame.top), (x, frame.bottom)), "rule"))
        sketch.add(Text(x, frame.bottom + 14, f"{value:g}", "muted", 11, "middle"))
    for value in lines:
        x = frame.x(value)
        sketch.add(Line(((x, frame.top), (x, frame.bottom)), "random", dash=True))
    for i, (row, e) in enumerate(zip(table.rows, entries, strict=True)):
        y = HEAD + (i + 0.5) * EACH
        ink = "best" if row.name == "evolved" else "accent"
        if e.paper is not None:
            sketch.add(Marks(((frame.x(e.paper), y),), "muted", 9, "ring"))
        if e.mean is None:
            sketch.add(Text(left - 8, y, "-", "muted", 11, "middle"))
            continue
        for low, high in [_sd_ends(e)] if e.sd is not None else []:
            a, b = frame.x(max(low, frame.xlim[0])), frame.x(min(high, frame.xlim[1]))
            sketch.add(Box(a, y - 3.5, b - a, 7, ink, 3, 0.28, title=f"{row.title}: {e}"))
        sketch.add(Marks(tuple((frame.x(v), y) for v in e.values), ink, 4, alpha=0.6))
        sketch.add(Box(frame.x(e.mean) - 1.5, y - 7, 3, 14, ink, 1, title=f"{row.title}: {e}"))


def _key(sketch: Sketch, y: float, *, baselines: bool) -> None:
    sketch.add(
        Box(NAMES_WIDTH, y - 7, 3, 14, "accent", 1),
        Text(NAMES_WIDTH + 9, y, "mean, sd and every seed", "muted", 11),
        Marks(((NAMES_WIDTH + 166, y),), "muted", 9, "ring"),
        Text(NAMES_WIDTH + 176, y, "the paper, on its own data", "muted", 11),
    )
    if baselines:
        x = NAMES_WIDTH + 346
        sketch.add(Line(((x, y), (x + 22, y)), "random", dash=True))
        sketch.add(Text(x + 28, y, "baselines without a network", "muted", 11))


def _curves(table: Table) -> Sketch:
    """A panel a column; for Fig. 5, whose series are two ways to train, a panel a series as in the paper."""
    series = list(dict.fromkeys(row.series for row in table.rows))
    beside = table.name == "fig5"
    panels = (
        [(c, [s]) for c in table.columns for s in series]
        if beside
        else [(c, series) for c in table.columns]
    )
    across = 2 if len(panels) > 1 else 1
    deep = -(-len(panels) // across)
    sketch = Sketch(WIDE, max(deep, 1) * (CURVE_HEIGHT + HEAD + FOOT))
    width = WIDE / across - 70
    for number, (column, shown) in enumerate(panels):
        entries = [table.entry(row, column) for row in table.rows]
        lines = [v[column.name] for v in table.baselines.values() if column.name in v]
        left = 44 + (number % across) * WIDE / across
        top = HEAD + (number // across) * (CURVE_HEIGHT + HEAD + FOOT)
        xlim = (0.0, 104.0)
        frame = Frame(sketch, left, top, width, CURVE_HEIGHT, xlim, _limits(entries, lines))
        name = f"{column.title}, %" + (f": {shown[0].lower()}" if beside else "")
        sketch.add(Text(left, top - 18, name, "ink", 12, bold=True))
        frame.rules(ticks(*frame.ylim, count=5), digits=0)
        what = "labelled train videos" if table.name == "fig4" else "unlabelled clips"
        frame.ticks((0, 25, 50, 75, 100), name=f"% of the {what}")
        for value in lines:
            y = frame.y(value)
            sketch.add(Line(((left, y), (frame.right, y)), "random", dash=True))
        for s in shown:
            _curve(frame, table, column, s, ink=f"task{(series.index(s) + 2) % 8}")
        for k, s in enumerate(shown if not beside else []):
            ink = f"task{(series.index(s) + 2) % 8}"
            sketch.add(Text(frame.right, frame.bottom - 14 - 16 * k, s, ink, 11, "end", bold=True))
    return sketch


def _curve(frame: Frame, table: Table, column: Column, series: str, *, ink: str) -> None:
    rows = [r for r in table.rows if r.series == series]
    found = [(100 * r.x, table.entry(r, column)) for r in rows]
    points = [(x, e, e.mean) for x, e in found if e.mean is not None]
    spread = [(x, _sd_ends(e)) for x, e, _ in points if e.sd is not None]
    if len(spread) > 1:
        above = [(frame.x(x), frame.y(ends[1])) for x, ends in spread]
        below = [(frame.x(x), frame.y(ends[0])) for x, ends in reversed(spread)]
        frame.sketch.add(Area((*above, *below), ink, 0.15))
    line = tuple((frame.x(x), frame.y(mean)) for x, _, mean in points)
    frame.sketch.add(Line(line, ink, 2), Marks(line, ink, 7))
    each = tuple((frame.x(x), frame.y(v)) for x, e, _ in points for v in e.values)
    frame.sketch.add(Marks(each, ink, 3.5, alpha=0.6))
    for x, e in found:
        if e.paper is not None:
            frame.sketch.add(Marks(((frame.x(x), frame.y(e.paper)),), "muted", 9, "ring"))
