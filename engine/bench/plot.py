"""The roofline: each stage's speed over its arithmetic intensity, below what memory and products allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.bench.rows import BANDWIDTH, COMPUTE, Limit, Row, teraflops

SUFFIXES = (".png", ".svg")


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


def roofs(rows: Sequence[Row]) -> tuple[list[Limit], list[Limit]]:
    """The bandwidths and the products' peaks that rows are held against, each once, the highest first."""
    found = {row.limit.name: row.limit for row in rows if row.limit is not None}
    ordered = sorted(found.values(), key=lambda limit: -limit.value)
    return (
        [limit for limit in ordered if limit.unit == BANDWIDTH],
        [limit for limit in ordered if limit.unit == COMPUTE],
    )


def draw_roofline(rows: Sequence[Row], path: Path) -> bool:
    """Write the picture; False, and no picture, where no row has both bytes and FLOPs."""
    from engine.report.figures.roofline import roofline  # only here: matplotlib takes a second

    shown = points(rows)
    if not shown:
        return False
    bandwidths, peaks = roofs([row for row in rows if row.flops and row.bytes])
    title = f"Roofline of the stages: {rows[0].about.get('device', '')}"
    roofline(shown, _lines(bandwidths), _lines(peaks), title=title).savefig(path, dpi=150)
    return True


def _lines(limits: Sequence[Limit]) -> list[tuple[str, float]]:
    """Limits as they are named beside the plot, and their values."""
    return [(f"{limit.name}: {limit.value:.3g} {limit.unit}", limit.value) for limit in limits]
