"""Members of a search: what was proposed, and what training and judging it gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from engine.objective.terms import LossWeights

State = Literal["complete", "failed", "pruned"]


@dataclass(frozen=True)
class Proposal:
    """A member to train."""

    number: int
    """Its place in the study, from 0."""
    weights: LossWeights
    parent: int | None = None
    """The member whose weights evolution copied; other methods note none."""
    mutated: str | None = None
    """The term whose weight differs from the parent's."""
    round: int = 0
    """0 for the initial population, then one member a round up to ``settings.rounds``; for cmaes, the generation."""
    start: Path | None = field(default=None, compare=False)
    """Its parent's end state, from which its networks start, for the last ``search.warm_start_steps``."""
    keep: Path | None = field(default=None, compare=False)
    """The file for its end state, from which its children start; None: none."""


@dataclass(frozen=True, kw_only=True)
class Trial(Proposal):
    """A member that is done, as the study keeps it: what was proposed, and what training and judging gave."""

    state: State = "complete"
    fitness: float | None = None
    """None for a member that failed or was pruned."""
    rungs: tuple[tuple[int, float], ...] = ()
    """(step, fitness) of a pruned member at each rung."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """All else that was noted of it; other programs may have written it."""

    @property
    def proposal(self) -> Proposal:
        """The member as it was proposed."""
        return Proposal(self.number, self.weights, self.parent, self.mutated, self.round)

    @property
    def partial(self) -> float | None:
        """A pruned member's fitness at its last rung."""
        return self.rungs[-1][1] if self.rungs else None

    @property
    def reason(self) -> str:
        """Why it failed or was pruned."""
        missing = "no reason recorded" if self.state == "failed" else ""
        return str(self.attributes.get("reason") or missing)

    @property
    def seconds(self) -> float | None:
        """Its share of its cohort's time."""
        return finite(self.attributes.get("seconds"))

    @property
    def clips_per_second(self) -> float | None:
        """Training clips a second while it was trained; its share where a cohort took turns."""
        return finite(self.attributes.get("clips_per_second"))

    @property
    def metrics(self) -> dict[str, float]:
        """Every measure of its features, by name: means over its trainings."""
        return finite_values(self.attributes.get("metrics"))

    @property
    def terms(self) -> dict[str, float]:
        """The last mean value of each loss term."""
        return finite_values(self.attributes.get("terms"))


def finite(value: object) -> float | None:
    """``value`` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def finite_values(table: object) -> dict[str, float]:
    """The entries of ``table`` that are finite numbers; none where it is no table."""
    items = table.items() if isinstance(table, Mapping) else ()
    return {str(k): number for k, v in items if (number := finite(v)) is not None}
