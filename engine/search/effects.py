"""What matters: each term's effect on fitness with its interval, and the paper's Sec. 4 beside it.

An effect is what fitness gains where a loss has more of a term, all else as in the members that were trained
(``surrogate.main_effects``). Effects of several terms are the mean of theirs. Any search's members will do: the
intervals are Bayesian, and don't ask why a loss was tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.objective.terms import TERM_NAMES, TERMS
from engine.search.members import Trial
from engine.search.surrogate import FEWEST, GROUPS, Array, computed_vectors, main_effects

INTERVAL = 0.9
"""Posterior probability of an interval."""


@dataclass(frozen=True)
class Effect:
    """Posterior mean of an effect, in the units of fitness, and its interval."""

    mean: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass(frozen=True)
class Effects:
    """The effects of all terms, and how they go together."""

    mean: Array
    """(J,)"""
    covariance: Array
    """(J, J)"""
    tried: NDArray[np.bool_]
    """(J,) whether the term's weight varies among the members."""
    members: int

    @cached_property
    def terms(self) -> dict[str, Effect]:
        """By term, those that were tried, in the table's order."""
        found = {name: self.of([name]) for name in TERM_NAMES}
        return {name: effect for name, effect in found.items() if effect}

    @cached_property
    def groups(self) -> dict[str, Effect]:
        """By task, and by what is distilled from each modality: the mean over the group's terms."""
        names = {
            g: [n for n, of in zip(TERM_NAMES, GROUPS, strict=True) if of == g] for g in GROUPS
        }
        found = {group: self.of(each) for group, each in names.items()}
        return {group: effect for group, effect in found.items() if effect}

    def of(self, more: Sequence[str], than: Sequence[str] = ()) -> Effect | None:
        """Mean effect of some terms, or how far it is above that of others; None where a side was not tried."""
        from scipy.stats import t  # type: ignore[import-untyped]  # only here: it takes a second

        mixture = np.zeros(len(TERM_NAMES))
        for names, sign in ((more, 1), (than, -1)):
            among = self.tried & np.isin(TERM_NAMES, names)
            if names and not among.any():
                return None
            mixture += sign * among / max(among.sum(), 1)
        mean = float(mixture @ self.mean)
        sd = math.sqrt(max(float(mixture @ self.covariance @ mixture), 0.0))
        half = sd * float(t.ppf((1 + INTERVAL) / 2, self.members - 1))
        return Effect(mean, mean - half, mean + half)


def effects_of(members: Sequence[Trial]) -> Effects | None:
    """Effects from all members that are complete; None for fewer than FEWEST, or equal fitness or weights."""
    complete = [member for member in members if member.fitness is not None]
    fitness = np.array([member.fitness for member in complete], np.float64)
    if len(complete) < FEWEST or np.ptp(fitness) == 0:
        return None
    weights = computed_vectors([member.weights for member in complete])
    tried = np.ptp(weights, axis=0) > 0
    return Effects(*main_effects(weights, fitness), tried, len(complete)) if tried.any() else None


class Claim(NamedTuple):
    """What the paper says of the loss that it found, and which effect is above 0 if that is so here."""

    text: str
    more: tuple[str, ...]
    than: tuple[str, ...] = ()
    """Terms whose mean effect is taken off; none: the effect itself."""


def _task(task: str) -> tuple[str, ...]:
    return tuple(term.name for term in TERMS if term.task == task)


def _layers(modality: str, *layers: int) -> tuple[str, ...]:
    return tuple(f"distill/{modality}@{layer}" for layer in layers)


HIGH = (*_task("align_audio"), *_task("predict"), "rgb/to_flow")
CLAIMS = (
    Claim("Audio alignment weighs much", _task("align_audio")),
    Claim("Future prediction weighs much", _task("predict")),
    Claim("RGB to flow weighs much", ("rgb/to_flow",)),
    Claim("Frame shuffle weighs little", HIGH, ("rgb/shuffle",)),
    Claim("Colorization weighs little", HIGH, ("grey/colorize",)),
    Claim("Grey joint embedding weighs little", HIGH, ("rgb+grey/embed",)),
    Claim("Grey is distilled early", _layers("grey", 0, 1), _layers("grey", 3, 4)),
    Claim("Audio is distilled late", _layers("audio", 3, 4), _layers("audio", 0, 1)),
    Claim("Flow is distilled late", _layers("flow", 3, 4), _layers("flow", 0, 1)),
)
"""Sec. 4 and the caption of Fig. 6, by terms' names; those that the table lacks are left out."""
VERDICTS = {1: "agrees", -1: "disagrees", 0: "can't tell"}


def compared(found: Effects) -> list[tuple[str, Effect | None, str]]:
    """Each claim's text, the effect or difference that it says is above 0, and whether this search agrees."""
    rows = []
    for claim in CLAIMS:
        sides = [set(side) & set(TERM_NAMES) for side in (claim.more, claim.than)]
        if sides[0] and (sides[1] or not claim.than):
            effect = found.of(claim.more, claim.than)
            rows.append((claim.text, effect, VERDICTS[effect.sign] if effect else "not tried"))
    return rows


def as_json(found: Effects | None) -> dict[str, Any]:
    """``effects`` and ``claims`` of summary.json; both empty where there are too few members."""
    if found is None:
        return {"effects": {}, "claims": []}
    return {
        "effects": {
            "interval": INTERVAL,
            "members": found.members,
            "terms": {name: vars(each) for name, each in found.terms.items()},
            "groups": {name: vars(each) for name, each in found.groups.items()},
        },
        "claims": [
            {"claim": text, **(vars(effect) if effect else {}), "verdict": verdict}
            for text, effect, verdict in compared(found)
        ],
    }
