"""Sketches: readable colours, round ticks, labels that keep apart, and a row for every term."""

from __future__ import annotations

import re

from engine.objective.terms import TERM_NAMES
from engine.report.figures.losses import DISTILL_GROUPS, TASK_GROUPS
from engine.report.figures.theme import PALETTE, RAMP, TURN, spread
from engine.report.words import duration


def test_letters_are_readable_on_every_shade() -> None:
    def light(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05

    def contrast(a: str, b: str) -> float:
        high, low = max(light(a), light(b)), min(light(a), light(b))
        return high / low

    for theme in (0, 1):
        for level, pair in enumerate(RAMP):
            letters = PALETTE["on-high" if level >= TURN else "on-low"][theme]
            assert contrast(pair[theme], letters) > 4
        plain = [n for n in PALETTE if not re.match(r"q\d|on-|rule|surface", n)]
        for name in plain:
            assert contrast(PALETTE[name][theme], PALETTE["surface"][theme]) > 4
            if name.startswith("task"):  # the time's bar has letters on them
                assert contrast(PALETTE[name][theme], PALETTE["on-high"][theme]) > 4


def test_spread() -> None:
    assert spread([50, 10, 52], gap=10, low=0, high=100) == [50, 10, 60]
    assert spread([98, 99], gap=10, low=0, high=100) == [90, 100]
    assert [duration(s) for s in (4.2, 725, 11530)] == ["4.2 s", "12 min 5 s", "3 h 12 min"]


def test_fig_3_has_a_row_for_every_term() -> None:
    rows = [t.name for groups in (TASK_GROUPS, DISTILL_GROUPS) for _, ts in groups for t in ts]
    assert sorted(rows) == sorted(TERM_NAMES)
