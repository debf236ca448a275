"""A table from its cells: mean, sd and n over seeds beside the paper's number; as text, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

from rich.table import Table as RichTable

from engine.display import table as rich_table
from engine.reproduce.cells import Cell, Store
from engine.reproduce.rows import TITLES, Column, Row

NO_NUMBER = "the paper gives no number"


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
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for column in self.columns:
                if note := self.entry(row, column).note:
                    names = found.setdefault(note, [])
                    if row.title not in names:
                        names.append(row.title)
        return [f"{', '.join(names)}: {note}" for note, names in found.items()]


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
            found = [store.read(Cell(row, seed, column)) for seed in seeds]
            entries[row.name, column.name] = _entry(row, column, found)
            for told in found:
                if told and "protocol_string" in told and row.labelled == 1.0:
                    protocols.setdefault(column.name, _without_seed(told["protocol_string"]))
    return Table(name, scale, tuple(columns), tuple(rows), entries, protocols, baselines or {})


def _entry(row: Row, column: Column, found: Sequence[dict[str, Any] | None]) -> Entry:
    done = [told for told in found if told and "failed" not in told]
    failed = [str(told["failed"]) for told in found if told and "failed" in told]
    if row.network is None:
        note = row.missing
    elif failed:
        note = f"{len(failed)} of {len(found)} failed: {failed[0]}"
    else:
        note = "" if len(done) == len(found) else f"{len(done)} of {len(found)} seeds done"
    trains = [told["train_videos"] for told in done if told.get("train_videos") is not None]
    return Entry(
        values=tuple(100 * float(told["value"]) for told in done),
        paper=row.paper.get(column.paper),
        labels_used=any(told["labels_used"] for told in done) if done else None,
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
