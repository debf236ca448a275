"""Rows: what they work out, how they are kept, compared and shown, and which stage they call the bottleneck."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console

from engine.bench.rows import (
    Limit,
    Row,
    append_json,
    bottleneck,
    check_path,
    comparison,
    draw_roofline,
    number,
    points,
    quantiles,
    read_json,
    roofs,
    rows_table,
)

COPY, PEAK = Limit("copy", 10.0, "GB/s"), Limit("product", 2.0, "TFLOP/s")


def row(**changes: Any) -> Row:
    base = Row(
        part="loss",
        name="op",
        shape="16x8",
        ms=(1.0, 2.0, 4.0),
        repeats=5,
        throughput=8.0,
        unit="clips/s",
        bytes=10_000_000,
        flops=1_000_000_000,
        about={"device": "box", "seed": 3},
    )
    return msgspec.structs.replace(base, **changes)


def shown(table: Any) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_what_was_reached_is_in_the_limits_unit() -> None:
    assert row().reached is None and row().percent is None
    assert row(limit=COPY).reached == pytest.approx(5.0)  # 10 MB in 2 ms
    assert row(limit=COPY).percent == pytest.approx(50.0)
    assert row(limit=PEAK).reached == pytest.approx(0.5)  # 1 GFLOP in 2 ms
    assert row(limit=PEAK).percent == pytest.approx(25.0)
    assert row(limit=Limit("threads", 32.0, "clips/s")).percent == pytest.approx(25.0)


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_quantiles(count: int) -> None:
    samples = np.random.default_rng(count).random(count)
    assert quantiles(samples.tolist()) == pytest.approx(
        tuple(np.quantile(samples, [0.2, 0.5, 0.8]))
    )


def test_numbers_have_three_digits() -> None:
    values = [0.0, 0.0123, 1.234, 12.34, 123.4, 12345.6, 2.5e7, 1e-5]
    texts = ["0.000", "0.012", "1.23", "12.3", "123", "12,346", "2.50e+07", "1.00e-05"]
    assert [number(v) for v in values] == texts


def test_json_lines_come_back(tmp_path: Path) -> None:
    rows = [row(limit=COPY, figures={"gain": 1.5}, note="a note"), row(name="other", peer=True)]
    append_json(rows[:1], tmp_path / "rows.jsonl")
    append_json(rows[1:], tmp_path / "rows.jsonl")
    assert read_json(tmp_path / "rows.jsonl") == rows
    first = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert first["percent"] == pytest.approx(50.0) and first["about"]["seed"] == 3


@pytest.mark.parametrize("text", ["", "nonsense\n", '{"part": "loss"}\n', "\xff\n"])
def test_files_that_hold_no_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.jsonl").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        read_json(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match=r"none\.jsonl: can't be read"):
        read_json(tmp_path / "none.jsonl")


def test_compare_matches_rows_and_says_what_is_missing() -> None:
    slow = row(ms=(1.0, 9.0, 9.0))
    ours = [slow, row(ms=(1.0, 6.0, 7.0)), row(name="mine")]
    theirs = [row(), row(shape="32x8"), row(name="mine", about={"device": "other box"})]
    table, missing = comparison(ours, theirs, names=("a", "b"))
    assert table.row_count == 1
    text = shown(table)
    assert "3.00" in text and "6.00" in text and "9.00" not in text  # the later row counts
    assert [line.split(":")[0] for line in missing] == ["only in a", "only in b", "only in b"]
    assert any("32x8" in line for line in missing) and any("other box" in line for line in missing)


def test_the_bottleneck_is_the_longest_stage() -> None:
    stages = [
        row(stage="decode", ms=(1, 50.0, 60.0)),
        row(stage="flow", ms=(1, 20.0, 60.0)),
        row(stage="views", ms=(1, 10.0, 60.0)),
    ]
    line = bottleneck(stages)
    assert line is not None and line.startswith("bottleneck of input: decode, 50.0 ms")
    assert "62%" in line or "63%" in line
    stages += [row(stage="input", ms=(1, 60.0, 1)), row(stage="step", ms=(1, 130.0, 1))]
    line = bottleneck(stages)
    assert line is not None and line.startswith("bottleneck of training: step, 130 ms")
    assert "65%" in line and "decode" not in line
    assert bottleneck([row()]) is None and bottleneck([row(stage="step")]) is None


def test_the_table_shows_limit_and_share() -> None:
    text = shown(rows_table("loss", [row(limit=COPY), row(name="eager", peer=True)]))
    assert "copy, 10.0 GB/s" in text and "50 %" in text and "  eager" in text


def test_roofline(tmp_path: Path) -> None:
    rows = [row(limit=COPY), row(name="b", limit=PEAK), row(flops=None), row(bytes=None)]
    assert points(rows)[0] == ("loss: op", pytest.approx(100.0), pytest.approx(0.5))
    assert len(points(rows)) == 2
    assert roofs([*rows, row(limit=COPY)], "GB/s") == [COPY]
    assert roofs([*rows, row(limit=COPY)], "TFLOP/s") == [PEAK]
    for name in ("roof.svg", "roof.png"):
        assert draw_roofline(rows, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    assert draw_roofline(rows[1:2], tmp_path / "peak.svg")
    assert draw_roofline(rows[:1], tmp_path / "copy.svg")
    assert not draw_roofline(rows[2:], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_pictures_that_cannot_be_written(tmp_path: Path) -> None:
    check_path(tmp_path / "roof.svg")
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        check_path(tmp_path / "roof.txt")
    with pytest.raises(ValueError, match="no folder"):
        check_path(tmp_path / "none" / "roof.svg")
