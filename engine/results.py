"""What an evaluation found, on the terminal and as files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path

from rich.console import Console

from engine.display import table
from engine.files import write_text_atomic
from engine.protocols import Evaluated
from engine.scores import Spread


def print_evaluated(found: Evaluated, *, name: str) -> None:
    """A protocol's metrics in percent, under the words that say how they came about."""
    console = Console(highlight=False)
    rows = [[metric, *_cells(spread)] for metric, spread in found.metrics.items()]
    used = "used before" if found.labels_used else "not used before"
    console.print(f"\n{found.protocol_string}; labels {used}", markup=False, soft_wrap=True)
    console.print(f"checkpoint: {name}", markup=False, soft_wrap=True)
    console.print(table("", ["", "mean %", "sd", "n"], rows))


def print_baselines(found: Mapping[str, Spread]) -> None:
    """Trivial baselines, if any were asked for."""
    if found:
        rows = [[name, *_cells(spread)] for name, spread in found.items()]
        Console(highlight=False).print(
            table("", ["trivial, the same folds", "mean %", "sd", "n"], rows)
        )


def _cells(spread: Spread) -> list[str]:
    return [f"{100 * spread.mean:.1f}", f"{100 * spread.sd:.1f}", str(spread.n)]


def append_rows(path: Path, found: Sequence[Evaluated], baselines: Mapping[str, Spread]) -> None:
    """Append a row a protocol to a JSON Lines file, and write the confusion matrices beside it."""
    trivial = {name: asdict(spread) for name, spread in baselines.items()}
    with path.open("a", encoding="utf-8") as file:
        for each in found:
            row = each.row() | ({"baselines": trivial} if trivial else {})
            file.write(json.dumps(row) + "\n")
    for number, each in enumerate(found):
        if each.confusion is not None:
            write_confusion(
                path.with_name(f"{path.stem}-{number}-{each.protocol}-confusion.csv"), each
            )


def write_confusion(path: Path, found: Evaluated) -> None:
    """Write a confusion matrix as CSV: a row a class, a column for what its videos were taken for."""
    text = StringIO()
    writer = csv.writer(text)
    writer.writerow(["class", *found.classes])
    assert found.confusion is not None
    for name, row in zip(found.classes, found.confusion, strict=True):
        writer.writerow([name, *row])
    write_text_atomic(path, text.getvalue())
