"""Measurements: rows with their limits, kept as JSON Lines, shown as a table and a roofline, compared with others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from rich.table import Table

from engine.core.display import table

BANDWIDTH, COMPUTE = "GB/s", "TFLOP/s"
SUFFIXES = (".png", ".svg")
"""Of pictures of the roofline."""


class Limit(Struct, frozen=True):
    """A stage's physical limit: measured on this machine, or worked out from measurements."""

    name: str
    value: float
    unit: str


class Row(Struct, frozen=True, kw_only=True):
    """One thing measured."""

    part: str
    name: str
    shape: str
    """The sizes that decide the time, such as ``16x12x48x48``."""
    ms: tuple[float, float, float]
    """The 20th, 50th and 80th percentile of a call's milliseconds."""
    repeats: int
    """Calls timed."""
    throughput: float
    """At the median, in ``unit``."""
    unit: str
    limit: Limit | None = None
    bytes: int | None = None
    """Bytes that a call must move, or that its operations move: the part says which."""
    flops: int | None = None
    """Floating point operations of a call, a multiplication and an addition being two."""
    peer: bool = False
    """Another way to do what the row above it does."""
    stage: str = ""
    """The stage of training that the row stands for where the bottleneck is named."""
    note: str = ""
    figures: dict[str, float] = {}
    """Further numbers, by name and unit."""
    about: dict[str, Any] = {}
    """Device, versions, git sha, seed, recipe and date."""

    @property
    def reached(self) -> float | None:
        """The call's speed at the median, in the limit's unit; None without a limit."""
        if self.limit is None:
            return None
        if self.limit.unit == BANDWIDTH:
            assert self.bytes is not None, self.name
            return gigabytes_per_second(self.bytes, self.ms[1])
        if self.limit.unit == COMPUTE:
            assert self.flops is not None, self.name
            return teraflops(self.flops, self.ms[1])
        assert self.limit.unit == self.unit, self.name
        return self.throughput

    @property
    def percent(self) -> float | None:
        """Per cent of the limit that was reached."""
        if self.limit is None or self.reached is None:
            return None
        return 100.0 * self.reached / self.limit.value

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The key by which rows of two files are the same measurement."""
        return self.part, self.name, self.shape, str(self.about.get("device", ""))


def gigabytes_per_second(count: int, ms: float) -> float:
    """Bytes in milliseconds as GB/s (10^9)."""
    return count / ms / 1e6


def teraflops(count: int, ms: float) -> float:
    """Floating point operations in milliseconds as TFLOP/s (10^12)."""
    return count / ms / 1e9


def per_second(count: float, ms: float) -> float:
    """Things in milliseconds as things a second."""
    return count / ms * 1e3


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, linear between samples."""
    low, median, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return low, median, high


def measured(samples: Sequence[float], *, count: float, **fields: Any) -> Row:
    """A row of timed calls (milliseconds), each of which does ``count`` of the row's unit."""
    ms = quantiles(samples)
    return Row(ms=ms, repeats=len(samples), throughput=per_second(count, ms[1]), **fields)


def append_json(rows: Sequence[Row], path: Path) -> None:
    """Append rows to a JSON Lines file; each line also says what was reached, for other readers."""
    with path.open("ab") as file:
        for row in rows:
            line = msgspec.to_builtins(row) | {"reached": row.reached, "percent": row.percent}
            file.write(msgspec.json.encode(line) + b"\n")


def read_json(path: Path) -> list[Row]:
    """Rows of a file that ``append_json`` wrote; raises ValueError that names the file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of `engine bench --json`: {error}"
            ) from None
    if not rows:
        raise ValueError(f"{path}: no rows in it; `engine bench --json {path}` writes them")
    return rows


def number(value: float) -> str:
    """Three significant digits, without an exponent where it can be done without."""
    if value == 0 or 0.001 <= abs(value) < 1e6:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f"{value:,.{digits}f}"
    return f"{value:.2e}"


def rows_table(title: str, rows: Sequence[Row]) -> Table:
    """A part's rows for the terminal; peers are set in below what they are beside."""
    cells = []
    for row in rows:
        limit = row.limit
        held = "" if limit is None else f"{limit.name}, {number(limit.value)} {limit.unit}"
        percent = "" if row.percent is None else f"{row.percent:.0f} %"
        rate = f"{number(row.throughput)} {row.unit}"
        name = f"  {row.name}" if row.peer else row.name
        cells.append([name, row.shape, *map(number, row.ms), rate, held, percent])
    columns = ["what", "sizes", "ms p20", "p50", "p80", "throughput", "limit", "reached"]
    return table(title, columns, cells)


def comparison(
    ours: Sequence[Row], theirs: Sequence[Row], *, names: tuple[str, str]
) -> tuple[Table, list[str]]:
    """Two files' rows side by side, and what only one of them has.

    Rows are matched by part, name, sizes and device; where a file measured something more than once, the last
    time counts. The ratio is the first file's median over the second's: above 1, the second is faster.
    """
    first, second = ({row.key: row for row in rows} for rows in (ours, theirs))
    common = [key for key in first if key in second]
    cells = []
    for key in common:
        a, b = first[key], second[key]
        rates = [f"{number(row.throughput)} {row.unit}" for row in (a, b)]
        times = [number(a.ms[1]), number(b.ms[1])]
        cells.append([f"{a.part}: {a.name}", a.shape, *times, *rates, f"{a.ms[1] / b.ms[1]:.2f}"])
    devices = ", ".join(sorted({key[3] for key in common})) or "no row in common"
    columns = ["what", "sizes", "ms, first", "second", "first", "second", "first / second"]
    shown = table(f"first: {names[0]}, second: {names[1]} ({devices})", columns, cells)
    missing = [
        f"only in {name}: {key[0]}: {key[1]}, {key[2]}, on {key[3]}"
        for name, rows in zip(names, (first, second), strict=True)
        for key in rows
        if key not in common
    ]
    return shown, missing


def bottleneck(rows: Sequence[Row]) -> str | None:
    """The stage that takes most of a batch's time, in one line; None where fewer than two stages were timed.

    Where the whole input, the views and the step were timed, they are training's stages; else those of
    the input are compared with one another.
    """
    stages = {row.stage: row.ms[1] for row in rows if row.stage}
    if {"input", "step"} <= set(stages):
        what, kept = "training", ["input", "views", "step"]
    else:
        what, kept = "input", [stage for stage in stages if stage not in ("input", "step")]
    stages = {stage: stages[stage] for stage in kept if stage in stages}
    if len(stages) < 2:
        return None
    worst = max(stages, key=stages.__getitem__)
    share = stages[worst] / sum(stages.values())
    others = ", ".join(f"{s} {number(ms)}" for s, ms in stages.items() if s != worst)
    return (
        f"bottleneck of {what}: {worst}, {number(stages[worst])} ms a batch beside {others}"
        f" ({share:.0%} of their sum)"
    )


def check_path(path: Path) -> None:
    """Raise ValueError for a picture that can't be written, before anything is measured."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--plot {path}: name a picture that ends in {' or '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no folder {path.absolute().parent}")


def points(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(label, FLOP per byte, TFLOP/s) of the rows that count both bytes and FLOPs."""
    return [
        (f"{row.part}: {row.name}", row.flops / row.bytes, teraflops(row.flops, row.ms[1]))
        for row in rows
        if row.flops and row.bytes
    ]


def roofs(rows: Sequence[Row], unit: str) -> list[Limit]:
    """The limits in a unit that rows are held against, each once, the highest first."""
    limits = {row.limit.name: row.limit for row in rows if row.limit and row.limit.unit == unit}
    return sorted(limits.values(), key=lambda limit: -limit.value)


def draw_roofline(rows: Sequence[Row], path: Path) -> bool:
    """Write the picture; False, and no picture, where no row has both bytes and FLOPs."""
    from engine.report.figures.roofline import roofline  # only here: matplotlib takes a second

    rows = [row for row in rows if row.flops and row.bytes]
    if not rows:
        return False
    title = f"Roofline of the stages: {rows[0].about.get('device', '')}"
    lines = [
        [(f"{limit.name}: {limit.value:.3g} {unit}", limit.value) for limit in roofs(rows, unit)]
        for unit in (BANDWIDTH, COMPUTE)
    ]
    roofline(points(rows), *lines, title=title).savefig(path, dpi=150)
    return True
