"""The paper's tables and figures again: mean, sd and n over seeds beside its numbers, as text, files and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table as RichTable

from engine.core.display import table as rich_table
from engine.core.files import write_text_atomic
from engine.evaluate.paper.cells import Cell, Store
from engine.evaluate.paper.rows import TITLES, Column, Row
from engine.report.figures.compare import color, rows_axis, spread_row
from engine.report.figures.theme import (
    COLOR,
    WIDE,
    Axes,
    Figure,
    beside,
    dots,
    note,
    place,
    rounded,
    sheet,
    svg,
    themed,
    write_png,
)

if TYPE_CHECKING:
    from engine.evaluate.paper.run import Reproduction

EACH, HEAD, FOOT = 22, 38, 64
"""Of a figure, in pixels: heights of a row, of the panels' names, and of what is under the panels."""
NAMES_WIDTH = 210
CURVE_HEIGHT = 230


@dataclass(frozen=True)
class Entry:
    """A row in a column; numbers are %."""

    values: tuple[float, ...]
    """One a seed."""
    paper: float | None
    labels_used: bool | None
    """Whether labels had a part in the representation."""
    train_videos: float | None
    """Labelled videos trained on."""
    note: str
    """Why there is no number, or fewer than seeds."""

    @property
    def mean(self) -> float | None:
        """Over seeds."""
        return fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Sample standard deviation; None for fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return (
            f"{self.mean:.1f}"
            + ("" if self.sd is None else f" ± {self.sd:.1f}")
            + f" ({len(self.values)})"
        )


@dataclass(frozen=True)
class Table:
    """A table or a figure's points."""

    name: str
    scale: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    entries: Mapping[tuple[str, str], Entry]
    """By row's and column's names."""
    protocols: Mapping[str, str]
    """By column's name: all that decides its numbers, in words."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name, then column: what needs no representation, %."""

    @property
    def title(self) -> str:
        """In words, with the scale."""
        return f"{TITLES[self.name]} (scale {self.scale})"

    def entry(self, row: Row, column: Column) -> Entry:
        """What stands there."""
        return self.entries[row.name, column.name]

    def notes(self) -> list[str]:
        """Footnotes: why numbers are missing."""
        notes: dict[str, list[str]] = {}
        for row in self.rows:
            for column in self.columns:
                if note := self.entry(row, column).note:
                    names = notes.setdefault(note, [])
                    if row.title not in names:
                        names.append(row.title)
        return [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def table_of(work: Reproduction) -> Table:
    """The table of the cells that are there."""
    return build(
        work.name,
        work.scale.name,
        rows=work.rows,
        columns=work.columns,
        seeds=work.seeds,
        store=work.store,
        baselines=work.run.read_json("baselines.json"),
    )


def write(work: Reproduction) -> Table:
    """Write the table of the cells that are there as .csv, .json and .md, and its figure as .svg and .png."""
    table, base = table_of(work), work.run.path
    write_text_atomic(base / f"{table.name}.csv", as_csv(table))
    write_text_atomic(base / f"{table.name}.json", json.dumps(as_json(table), indent=1) + "\n")
    write_text_atomic(base / f"{table.name}.md", as_markdown(table))
    drawn = figure(table)
    write_text_atomic(base / f"{table.name}.svg", svg(drawn, label=table.title))
    write_png(drawn, base / f"{table.name}.png", title=table.title)
    return table


def build(
    name: str,
    scale: str,
    *,
    rows: Sequence[Row],
    columns: Sequence[Column],
    seeds: Sequence[int],
    store: Store,
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Table:
    """A table from the cells that are there."""
    entries: dict[tuple[str, str], Entry] = {}
    protocols: dict[str, str] = {}
    for row in rows:
        for column in columns:
            results = [store.read(Cell(row, seed, column)) for seed in seeds]
            entries[row.name, column.name] = _entry(row, column, results)
            for result in results:
                if result and "protocol_string" in result and row.labelled == 1.0:
                    protocols.setdefault(column.name, _without_seed(result["protocol_string"]))
    return Table(name, scale, tuple(columns), tuple(rows), entries, protocols, baselines or {})


def _entry(row: Row, column: Column, results: Sequence[dict[str, Any] | None]) -> Entry:
    done = [result for result in results if result and "failed" not in result]
    failed = [str(result["failed"]) for result in results if result and "failed" in result]
    if row.network is None:
        note = row.missing
    elif failed:
        note = f"{len(failed)} of {len(results)} failed: {failed[0]}"
    else:
        note = "" if len(done) == len(results) else f"{len(done)} of {len(results)} seeds done"
    trains = [result["train_videos"] for result in done if result.get("train_videos") is not None]
    return Entry(
        values=tuple(100 * float(result["value"]) for result in done),
        paper=row.paper.get(column.paper),
        labels_used=any(result["labels_used"] for result in done) if done else None,
        train_videos=fmean(trains) if trains else None,
        note=note,
    )


def _without_seed(protocol: str) -> str:
    return ", ".join(p for p in protocol.split(", ") if not p.startswith(("seed ", "seeds ")))


def _shown(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table as people read it."""
    heads = [""]
    for column in table.columns:
        heads.append(f"{column.title}, %")
        if any(table.entry(row, column).paper is not None for row in table.rows):
            heads.append("paper")
    heads.append("labels")
    lines = []
    for row in table.rows:
        line, used = [row.title], None
        for column in table.columns:
            entry = table.entry(row, column)
            line.append(str(entry))
            used = entry.labels_used if used is None else used or bool(entry.labels_used)
            if any(table.entry(r, column).paper is not None for r in table.rows):
                line.append("" if entry.paper is None else f"{entry.paper:.1f}")
        lines.append([*line, "" if used is None else "yes" if used else "no"])
    for name, values in table.baselines.items():
        line = [f"{name} (no network)"]
        for column in table.columns:
            value = values.get(column.name)
            line.append("-" if value is None else f"{value:.1f}")
            if any(table.entry(r, column).paper is not None for r in table.rows):
                line.append("")
        lines.append([*line, ""])
    return heads, lines


def as_text(table: Table) -> tuple[RichTable, list[str]]:
    """For the terminal: the table, and lines to go under it."""
    heads, lines = _shown(table)
    under = [
        f"{c.title}: {table.protocols[c.name]}" for c in table.columns if c.name in table.protocols
    ]
    return rich_table(table.title, heads, lines), [*under, *table.notes()]


def as_markdown(table: Table) -> str:
    """Ready to paste into a page."""
    heads, lines = _shown(table)
    parts = [f"**{table.title}**: mean ± sd over seeds (n).", ""]
    for cells in (heads, ["---", *["---:"] * (len(heads) - 1)], *lines):
        parts.append("| " + " | ".join(cells) + " |")
    parts += ["", f"![{table.title}]({table.name}.svg)", ""]
    if table.protocols:
        parts += ["Protocols:", ""]
        shown = [c for c in table.columns if c.name in table.protocols]
        parts += [*(f"- {c.title}: {table.protocols[c.name]}." for c in shown), ""]
    if notes := table.notes():
        parts += ["Missing numbers:", "", *(f"- {note}." for note in notes), ""]
    parts.append(
        '"labels": whether labels had a part in the representation, in its training or in choosing its loss.'
        " The paper's numbers are on HMDB51, UCF101 or Kinetics, with its own unlabelled videos."
    )
    return "\n".join(parts) + "\n"


def as_csv(table: Table) -> str:
    """A line a row and column."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        "table scale row title column series x mean sd n paper labels_used train_videos note".split()
    )
    for row in table.rows:
        for column in table.columns:
            e = table.entry(row, column)
            where = [table.name, table.scale, row.name, row.title, column.name, row.series, row.x]
            numbers = [_plain(e.mean), _plain(e.sd), len(e.values), _plain(e.paper)]
            used = "" if e.labels_used is None else str(e.labels_used).lower()
            writer.writerow([*where, *numbers, used, _plain(e.train_videos), e.note])
    for name, values in table.baselines.items():
        for column_name, value in values.items():
            writer.writerow(
                [table.name, table.scale, "baseline", name, column_name, "", "", _plain(value)]
                + ["", "", "", "", "", ""]
            )
    return out.getvalue()


def _plain(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4f}".rstrip("0").rstrip(".")


def as_json(table: Table) -> dict[str, Any]:
    """All of it."""
    return {
        "table": table.name,
        "title": table.title,
        "scale": table.scale,
        "columns": [asdict(column) for column in table.columns],
        "protocols": dict(table.protocols),
        "baselines": {name: dict(values) for name, values in table.baselines.items()},
        "rows": [
            {
                "row": row.name,
                "title": row.title,
                "group": row.group,
                "series": row.series,
                "x": row.x,
                "cells": {c.name: _cell(table.entry(row, c)) for c in table.columns},
            }
            for row in table.rows
        ],
    }


def _cell(e: Entry) -> dict[str, Any]:
    return {
        "mean": e.mean,
        "sd": e.sd,
        "n": len(e.values),
        "values": list(e.values),
        "paper": e.paper,
        "labels_used": e.labels_used,
        "train_videos": e.train_videos,
        "note": e.note,
    }


@themed
def figure(table: Table) -> Figure:
    """The table's figure: curves where its rows are points of series, otherwise dots."""
    return _curves(table) if any(row.series for row in table.rows) else _dots(table)


def _limit(axes: Axes, entries: Sequence[Entry], lines: Sequence[float], *, axis: str) -> None:
    """Room about what is drawn, within 0 and 104 %."""
    ends = [v for e in entries if e.mean is not None for v in (*e.values, e.mean)]
    ends += [
        e.mean + side * e.sd for e in entries if e.mean is not None and e.sd for side in (-1, 1)
    ]
    ends += [*(e.paper for e in entries if e.paper is not None), *lines]
    low, high = (min(ends), max(ends)) if ends else (0.0, 100.0)
    room = max(0.06 * (high - low), 1.0)
    axes.set(**{f"{axis}lim": (max(low - room, 0.0), min(high + room, 104.0))})


def _baselines(table: Table, column: Column) -> list[float]:
    return [v[column.name] for v in table.baselines.values() if column.name in v]


def _dots(table: Table) -> Figure:
    """A panel a column: every row's seeds, their mean and sd, and the paper's number."""
    tall = EACH * len(table.rows)
    figure = sheet(WIDE, HEAD + tall + FOOT)
    for i, row in enumerate(table.rows):
        if i and row.group != table.rows[i - 1].group:
            place(
                figure,
                0,
                HEAD + i * EACH - 0.5,
                WIDE,
                1,
                xticks=[],
                yticks=[],
                facecolor=COLOR["rule"],
            )
        best = row.name == "evolved"
        look = {"size": 12, "weight": "bold" if best else "normal"}
        note(figure, 0, HEAD + (i + 0.5) * EACH, row.title, "best" if best else "ink", **look)
    each = (WIDE - NAMES_WIDTH) / max(len(table.columns), 1)
    for number, column in enumerate(table.columns):
        left = NAMES_WIDTH + number * each
        _panel(place(figure, left, HEAD, each - 28, tall), table, column)
        title, _, more = column.title.partition(" (")
        middle = left + (each - 28) / 2
        note(figure, middle, 8, f"{title}, %", "ink", ha="center", size=12, weight="bold")
        note(figure, middle, 24, more and f"({more}", ha="center")
    y = HEAD + tall + 48
    note(figure, NAMES_WIDTH, y, "┃", "accent")
    note(figure, NAMES_WIDTH + 9, y, "mean, sd and every seed")
    note(figure, NAMES_WIDTH + 166, y, "○")
    note(figure, NAMES_WIDTH + 180, y, "the paper, on its own data")
    if table.baselines:
        note(figure, NAMES_WIDTH + 346, y, "┄" * 2, "random")
        note(figure, NAMES_WIDTH + 374, y, "baselines without a network")
    return figure


def _panel(axes: Axes, table: Table, column: Column) -> None:
    """One column's dots."""
    entries = [table.entry(row, column) for row in table.rows]
    rows_axis(axes, len(entries) - 0.5, count=4)
    for value in _baselines(table, column):
        axes.axvline(value, color=COLOR["random"], lw=1, ls="--")
    _limit(axes, entries, _baselines(table, column), axis="x")
    for i, (row, e) in enumerate(zip(table.rows, entries, strict=True)):
        if e.paper is not None:
            dots(axes, [(e.paper, i)], color="muted", size=8, ring=True)
        if e.mean is None:
            beside(axes, "-", (0, i), (-10, 0), units=("axes fraction", "data"))
            continue
        ink = "best" if row.name == "evolved" else "accent"
        spread_row(axes, i, e.mean, e.sd, e.values, color=ink, title=f"{row.title}: {e}")


def _curves(table: Table) -> Figure:
    """A panel a column; for Fig. 5, whose series are two ways to train, a panel a series as in the paper."""
    series = list(dict.fromkeys(row.series for row in table.rows))
    beside = table.name == "fig5"
    groups = [[s] for s in series] if beside else [series]
    panels = [(column, group) for column in table.columns for group in groups]
    across = 2 if len(panels) > 1 else 1
    each = CURVE_HEIGHT + HEAD + FOOT
    figure = sheet(WIDE, max(-(-len(panels) // across), 1) * each)
    what = "labelled train videos" if table.name == "fig4" else "unlabelled clips"
    for number, (column, shown) in enumerate(panels):
        left, top = 44 + (number % across) * WIDE / across, HEAD + (number // across) * each
        axes = place(figure, left, top, WIDE / across - 70, CURVE_HEIGHT, xlabel=f"% of the {what}")
        axes.set_title(f"{column.title}, %" + (f": {shown[0].lower()}" if beside else ""))
        axes.set(xlim=(0, 104), xticks=(0, 25, 50, 75, 100))
        entries = [table.entry(row, column) for row in table.rows]
        _limit(axes, entries, _baselines(table, column), axis="y")
        axes.yaxis.set_major_locator(rounded(5))
        for value in _baselines(table, column):
            axes.axhline(value, color=COLOR["random"], lw=1, ls="--")
        for s in shown:
            _curve(axes, table, column, s, ink=color(series.index(s) + 2))
        if not beside:
            axes.legend(
                loc="lower right", labelcolor="linecolor", reverse=True, prop={"weight": "bold"}
            )
    return figure


def _curve(axes: Axes, table: Table, column: Column, series: str, *, ink: str) -> None:
    """A series' means with a band of one sd, every seed, and the paper's points."""
    cells = [(100 * r.x, table.entry(r, column)) for r in table.rows if r.series == series]
    means = [(x, e.mean, e.sd) for x, e in cells if e.mean is not None]
    band = np.array([(x, mean - sd, mean + sd) for x, mean, sd in means if sd is not None])
    seeds = [(x, v) for x, e in cells for v in e.values]
    paper = [(x, e.paper) for x, e in cells if e.paper is not None]
    if len(band) > 1:
        axes.fill_between(*band.T, color=COLOR[ink], alpha=0.15)
    if means:
        line = [(x, mean) for x, mean, _ in means]
        dots(axes, line, color=ink, size=6, ls="-", lw=2, label=series)
        dots(axes, seeds, color=ink, size=3.5, alpha=0.6)
    if paper:
        dots(axes, paper, color="muted", size=8, ring=True)
