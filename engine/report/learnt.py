"""What each task learnt: its term after the first steps and near the end of a training, in units of chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.objective.terms import TERM_NAMES

NEAR_CHANCE = 0.95
"""A term that ends above this learnt nothing to speak of: 1 is a trivial predictor's error."""
COLLAPSED = 0.5
"""A network whose features spread in less than this share of the directions that they began with has collapsed."""


@dataclass(frozen=True)
class Learnt:
    """One term's way."""

    term: str
    start: float
    end: float

    @property
    def near_chance(self) -> bool:
        """Whether nothing was learnt; in units of chance alone."""
        return not self.end < NEAR_CHANCE


def what_each_learnt(start: Mapping[str, float], end: Mapping[str, float]) -> list[Learnt]:
    """Rows for terms that have both values, in the table's order.

    ``start`` and ``end`` are ``terms_at_start`` and ``terms`` of a member's attributes or of terms.json.
    """
    return [Learnt(n, start[n], end[n]) for n in TERM_NAMES if n in start and n in end]


def collapsed(ranks: Mapping[str, Sequence[float]]) -> list[str]:
    """Networks that have collapsed, by a member's ``feature_ranks``: each at the start and at the end."""
    return [m for m, (start, end) in ranks.items() if end < COLLAPSED * start]
