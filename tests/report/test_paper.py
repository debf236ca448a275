"""Tables from made-up cells: their numbers, footnotes and files, and their figures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from engine.evaluate.paper.cells import Cell, Store
from engine.evaluate.paper.rows import Given, columns_of, rows_of
from engine.evaluate.paper.scale import load_scale
from engine.report.figures.theme import svg, write_png
from engine.report.paper import Table, as_csv, as_json, as_markdown, as_text, build, figure

SEEDS = (0, 1, 2)


def made(folder: Path, table: str, *, skip: tuple[str, ...] = ()) -> Table:
    """A table whose cells hold (place of the row + seed / 10) %, but for a failed one and those of ``skip``."""
    scale, store = load_scale("cpu"), Store(folder)
    rows = rows_of(table, scale, Given({"evolved": "sec4"}))
    columns = columns_of(table, scale, datasets=["folders"], by_group=[True])
    for place, row in enumerate(rows):
        for seed in SEEDS:
            for column in columns:
                if row.network is None or row.name in skip:
                    continue
                told = {
                    "value": (place + seed / 10) / 100,
                    "labels_used": False,
                    "protocol_string": f"{column.name}, seed {seed}",
                }
                if row.name == "equal" and seed == 2:
                    told = {"failed": "a reason"}
                store.write(Cell(row, seed, column), told)
    base = {"a baseline": {"linear": 43.3}}
    return build(table, "cpu", rows=rows, columns=columns, seeds=SEEDS, store=store, baselines=base)


def test_numbers_are_over_seeds(tmp_path: Path) -> None:
    table = made(tmp_path, "table1", skip=("random",))
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    found = {(line["row"], line["column"]): line for line in lines}
    place = [row.name for row in table.rows].index("rgb_to_flow")
    values = place + np.array([0.0, 0.1, 0.2])
    line = found["rgb_to_flow", "linear"]
    assert float(line["mean"]) == pytest.approx(values.mean(), abs=1e-4)
    assert float(line["sd"]) == pytest.approx(values.std(ddof=1), abs=1e-4)
    assert (line["n"], line["paper"], line["labels_used"]) == ("3", "36.4", "false")
    assert found["random", "linear"]["mean"] == "" and found["random", "linear"]["n"] == "0"
    assert found["equal", "kmeans"]["n"] == "2"
    assert found["equal", "kmeans"]["note"] == "1 of 3 failed: a reason"
    assert found["imagenet", "kmeans"]["note"].startswith("not given: --imagenet")
    assert found["baseline", "linear"]["mean"] == "43.3"
    told = json.loads(json.dumps(as_json(table)))
    assert told["rows"][place]["cells"]["linear"]["values"] == pytest.approx(values)


def test_text_and_markdown_show_the_same(tmp_path: Path) -> None:
    table = made(tmp_path, "table1", skip=("random",))
    console = Console(width=250, file=io.StringIO(), color_system=None)
    shown, under = as_text(table)
    console.print(shown)
    file = console.file
    assert isinstance(file, io.StringIO)
    text, page = file.getvalue(), as_markdown(table)
    cells = "7.1 ± 0.1 (3)"
    assert cells in text and cells in page
    assert any(line == "Random loss: 0 of 3 seeds done" for line in under)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table.rows) + 1
    assert len({line.count("|") for line in rows}) == 1
    assert "kmeans." in page and "seed 0" not in page
    assert any(line.startswith("| Random loss | - | 25.4 | - | 27.6 | - | - |") for line in rows)


@pytest.mark.parametrize("name", ["table1", "table2", "fig4", "fig5"])
def test_figures_are_files_that_parse(tmp_path: Path, name: str) -> None:
    table = made(tmp_path, name)
    drawn = figure(table)
    root = ElementTree.fromstring(svg(drawn, label=table.title))
    texts = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    if name in ("table1", "table2"):
        assert {row.title for row in table.rows} <= set(texts)
    else:
        assert "100" in texts
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        assert 0 <= float(text.attrib["x"]) <= width and 0 <= float(text.attrib["y"]) <= height
    for axes in drawn.axes:  # what is drawn lies within the plots
        low, high = sorted(axes.get_xlim())
        for line in axes.get_lines():
            if line.get_transform() == axes.transData:
                assert all(low <= x <= high for x in line.get_xdata())
    write_png(drawn, tmp_path / "a.png", title="a")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_table_has_a_figure(tmp_path: Path) -> None:
    scale = load_scale("cpu")
    for name in ("table1", "fig5"):
        rows = rows_of(name, scale, Given())
        columns = columns_of(name, scale, datasets=["folders"], by_group=[True])
        empty = build(name, "cpu", rows=rows, columns=columns, seeds=SEEDS, store=Store(tmp_path))
        ElementTree.fromstring(svg(figure(empty), label="x"))
        assert "-" in as_markdown(empty)
