"""Goals, what arithmetic predicts for each on an H100, and the table of goal, prediction and what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from gpu_checks.record import PART_ROW, SENSES, number

COPY = 3.0e12
"""Bytes a second of a device copy as measured on an H100 SXM, read and written (3.35e12 by datasheet)."""
MATRIX = 798e12
"""FLOPs a second of an 8192 bf16 product as measured there (989e12 by datasheet)."""
FLOAT32 = 45e12
"""FLOPs a second of IEEE float32 products, two thirds of the datasheet's 67e12."""
CLIP_FLOPS = 241e9
"""R3D-18, 16 x 112 x 112, forward and backward of a clip."""
PASS_BYTES = 85e6
"""Its convolutions' and norms' outputs in bf16, of one clip."""


@dataclass(frozen=True)
class Goal:
    """A goal and its prediction; ``part`` and ``row`` name the row that is held against it."""

    text: str
    part: str
    row: str
    goal: float
    unit: str
    predicted: float
    why: str
    sense: str = ">="


# R3D-18's convolutions: forward and data gradient at 45 % of the peak (over half of the work has 64 channels, which
# fill half a tile), weight gradient, slow in 3-D, at 25 %; then memory: about 6 passes eager, 3 when fused.
_CONV = (2 / 3 * CLIP_FLOPS) / (0.45 * MATRIX) + (1 / 3 * CLIP_FLOPS) / (0.25 * MATRIX)
_EAGER, _FUSED = _CONV + 6 * PASS_BYTES / COPY, _CONV + 3 * PASS_BYTES / COPY
# Milliseconds at a search's size, 16 clips of 12 frames. Input: 192 small JPEGs and 176 pairs of flow. A step: eager,
# 2,444 operations of 5 us and what autograd adds; recorded in CUDA graphs, 900 kernels of about 2 us, with 45 launches
# and Python's part of about 2 ms beside them.
_D, _EAGER_STEP, _C = 60.0, 15.0, 3.0
# K-means of 16 members from 30 starts: 5 candidates a centre, then about 15 iterations of two products of 2NKD.
_STARTS = 16 * 30
_PRODUCT = 2 * 3570 * 51 * 2048
_KMEANS = _STARTS * _PRODUCT * (5 + 2 * 15) / FLOAT32 * 1.4
_RANKS = 16 * 0.1
_CUML = _STARTS * 0.008
_TRAINING = 16 * 150 * 3 * 3 * 16 * _FUSED

GOALS = (
    Goal(
        "fused loss and gradients, R3D-50, share of copy bandwidth", "bench",
        "fused loss, share of copy", 85, "%", 92,
        "3 units of 1032 MB (reads two, writes one) take 1.03 ms at 3.0 TB/s; ramp, tail and the small launch after it"
        " lose 20 us, the last wave of programs 4 %; reading twice what is written is a little faster than a copy",
    ),
    Goal(
        "fused loss over eager AMP", "bench", "fused loss over eager AMP", 4.0, "times", 46 / 6 * 0.9,
        "eager in float32 moves 28 bytes an element forward, 18 backward; the op 6 in one pass, and nothing where"
        " upstream's factor is 1: 46 / 6, less 10 % for launches",
    ),
    Goal(
        "fused loss over Inductor", "bench", "fused loss over Inductor", 1.3, "times", 10 / 6 * 0.95,
        "Inductor reads 4 bytes an element forward, reads 4 and writes 2 backward; the op 6 in one pass:"
        " 10 / 6, less 5 %. Inside a compiled graph, where upstream's factor comes in, it would be 10 / 10",
    ),
    Goal(
        "clip_views, float32 (as training has it), share of copy", "bench",
        "clip_views, share of copy, float32", 85, "%", 88,
        "19 bytes a pixel: 203 us for 32 M pixels; about 60 instructions a pixel need 67 us beside them",
    ),
    Goal(
        "clip_views, bf16, share of copy", "bench", "clip_views, share of copy, bfloat16", 85, "%", 78,
        "11 bytes a pixel: 118 us, no longer twice the 67 us of instructions",
    ),
    Goal(
        "R3D-18 supervised step, share of the matrix peak", "supervised",
        "supervised step, compiled: share of the matrix peak", 30, "%",
        100 * CLIP_FLOPS / _FUSED / MATRIX,
        "convolutions forward and to data at 45 % of the peak, to weights at 25 %, and 3 passes over 85 MB a clip",
    ),
    Goal(
        "the same in clips/s, beside SPDL's 171 a GPU end to end", "supervised",
        "supervised step, compiled", 171, "clips/s", 1 / _FUSED, "as above",
    ),
    Goal(
        "four-network step, compiled over eager AMP", "step", "step: default over eager AMP", 1.8,
        "times", _EAGER / _FUSED,
        "the convolutions stay as they are; only 3 of about 6 passes over memory go, and at 144 clips a step"
        " launches do not count",
    ),
    Goal(
        "16 members on one GPU over one process a member", "cohort",
        "cohort of 16 over one process a member", 6.0, "times", 16 * max(_D, _C) / max(_D, 16 * _C),
        f"input D {_D:g} ms and steps C {_C:g} ms, one behind the other: 16 max(D, C) / max(D, 16 C); without CUDA"
        f" graphs C is {_EAGER_STEP:g} ms and this {16 * _D / (16 * _EAGER_STEP):g}",
    ),
    Goal(
        "a search's step with CUDA graphs over eager", "graphs", "search step: CUDA graphs over eager",
        2.0, "times", _EAGER_STEP / _C,
        f"{_EAGER_STEP:g} ms of launches become {_C:g}: 900 kernels of 2 us in a graph, a host's 2 ms beside them",
    ),
    Goal(
        "k-means fitness of 16 members in their evaluation", "kmeans", "derived: k-means in the evaluation",
        1.0, "%", 100 * (_KMEANS + _RANKS) / _TRAINING,
        f"{_KMEANS:.2f} s of products and {_RANKS:.1f} s of effective ranks (16 eigenvalue problems of 2048 in"
        f" float64) beside {_TRAINING:.0f} s of 150 four-network steps each",
        "<=",
    ),
    Goal(
        "k-means of 16 members over cuML one by one", "kmeans", "batched over cuML one by one", 5.0,
        "times", _CUML / _KMEANS,
        f"480 starts of about 8 ms are {_CUML:.1f} s, in one batch {_KMEANS:.2f} s",
    ),
)  # fmt: skip


def latest(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """The newest row of each check; what a part's earlier, failed runs left is replaced name by name."""
    return {(row["part"], row["name"]): row for row in rows}


def derived(found: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Add rows that are worked out of several parts'."""
    fitness = found.get(("kmeans", "k-means fitness of the cohort"))
    name = next(
        (
            key
            for key in found
            if key[0] == "step" and key[1].startswith("step: compiled (default)")
        ),
        None,
    )
    if fitness is None or name is None or not isinstance(fitness["seen"], float):
        return
    rate = found[name]["seen"]
    if not isinstance(rate, (int, float)) or not rate:
        return
    training = 16 * 150 * 16 / rate
    share = 100 * fitness["seen"] / (training + fitness["seen"])
    row = {**fitness, "name": "derived: k-means in the evaluation", "seen": share, "unit": "%"}
    row |= {
        "detail": f"{fitness['seen']:.2f} s beside {training:.0f} s of training (150 steps of 16 clips)"
    }
    found["kmeans", row["name"]] = row | {"ok": share <= 1.0}


def goal_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Goal, prediction, what was seen, whether that is enough, and why that was predicted."""
    found = latest(rows)
    derived(found)
    lines = []
    for goal in GOALS:
        row = found.get((goal.part, goal.row))
        seen, reached = "-", "-"
        if row is not None and row["ok"] == "absent":
            seen = "absent"
        elif row is not None and isinstance(row["seen"], (int, float)):
            seen = f"{number(row['seen'])} {goal.unit}"
            reached = "yes" if SENSES[goal.sense](row["seen"], goal.goal) else "NO"
        elif row is not None:
            seen = "failed"
        held = f"{goal.sense} {goal.goal:g} {goal.unit}"
        predicted = f"{number(goal.predicted)} {goal.unit}"
        lines.append([goal.text, held, predicted, seen, reached, goal.why])
    return lines


def check_lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """All checks, the newest row of each."""
    lines = []
    for row in latest(rows).values():
        ok = (
            {True: "ok", False: "NOT OK"}.get(row["ok"], row["ok"])
            if isinstance(row["ok"], bool)
            else row["ok"]
        )
        held = "" if row["goal"] is None else f"{row['sense']} {row['goal']:g}"
        seen = "" if row["seen"] is None else f"{number(row['seen'])} {row['unit']}".strip()
        lines.append([row["part"], row["name"], ok, held, seen, row["detail"][:160]])
    return lines


def goal_table(rows: Sequence[dict[str, Any]], *, title: str) -> Table:
    """``goal_lines`` as a table."""
    goals = Table(title=title, show_lines=True)
    for column in ("goal", "", "predicted (H100)", "seen", "reached", "why that was predicted"):
        goals.add_column(column, overflow="fold")
    for line in goal_lines(rows):
        goals.add_row(*line)
    return goals


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print both tables, for each machine that the rows are of."""
    console = Console(highlight=False, width=230)
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        mine = [row for row in rows if row["gpu"] == gpu]
        codes = ", ".join(dict.fromkeys(row["code"] for row in mine))
        checks = Table(title=f"checks on {gpu}, code {codes}")
        for column in ("part", "check", "", "goal", "seen", "detail"):
            checks.add_column(column, overflow="fold")
        for line in check_lines(mine):
            checks.add_row(*line)
        console.print(checks, markup=False)
        if mine[0]["device"] == "cuda":  # tiny sizes on a CPU say nothing about the goals
            console.print(goal_table(mine, title=f"goals on {gpu}"), markup=False)
        counts = [row["ok"] for row in latest(mine).values() if row["name"] != PART_ROW]
        told = f"{counts.count(True)} ok, {counts.count(False)} not ok, {counts.count('absent')} absent"
        console.print(told, markup=False)
