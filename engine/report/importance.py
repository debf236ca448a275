"""How much each weight matters to fitness: fANOVA over the search's members (Hutter et al. 2014), by Optuna.

It stands beside the paper's reading, which takes a term's final weight for its importance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import create_trial

from engine.objective.terms import TERM_NAMES
from engine.report.measures import spearman
from engine.report.run import Array, Run, fitness_of

FEWEST = 8
"""Members with a fitness below which nothing is computed."""
TREES = 64
"""Trees of a forest, as Optuna has by default."""
WORK = 16_000
"""Trees times members of a forest, at most: its time grows with both, and this takes some six seconds."""
SHUFFLES = (5, 2)
"""How often fitness is dealt out to the members at random, to see what share chance gives: few members, many."""
FEW = 4_000
"""Trees times members of a forest up to which there is time for the first."""


@dataclass(frozen=True)
class Importance:
    """Each term's share of the variance of fitness, and what to judge it by."""

    share: Mapping[str, float]
    """Term -> share of the forest's variance that its weight alone makes, in [0, 1]; they sum to 1 at most."""
    weight: Mapping[str, float]
    """Term -> its weight in the best loss: the paper's reading of what matters."""
    direction: Mapping[str, float]
    """Term -> rank correlation of its weight with fitness over the members; 0 where a weight never changes."""
    chance: float
    """The highest share of any term after fitness was dealt out at random, the highest of all times."""
    shuffles: int
    """How often that was done."""
    agreement: float | None
    """Rank correlation, over terms, of share and the best loss's weight; None where either is constant."""
    members: int
    trees: int


def importance(run: Run) -> Importance | None:
    """Importance of every term; None with fewer than ``FEWEST`` complete members, or equal fitness of all.

    Equal runs give equal numbers: the forests' seed is fixed.
    """
    fitness = np.array([fitness_of(t) for t in run.complete], dtype=np.float64)
    if run.weights is None or len(fitness) < FEWEST or np.ptp(fitness) == 0:
        return None
    table = np.array([[t.weights[n] for n in TERM_NAMES] for t in run.complete], dtype=np.float64)
    trees = max(8, min(TREES, WORK // len(fitness)))
    if (share := _fanova(table, fitness, trees=trees)) is None:
        return None
    rng, times = np.random.default_rng(0), SHUFFLES[trees * len(fitness) > FEW]
    dealt = [_fanova(table, rng.permutation(fitness), trees=trees) for _ in range(times)]
    highest = [max(d.values()) for d in dealt if d is not None]
    final = np.array([run.weights[n] for n in TERM_NAMES])
    return Importance(
        share=share,
        weight=run.weights,
        direction={n: spearman(table[:, i], fitness) or 0.0 for i, n in enumerate(TERM_NAMES)},
        chance=max(highest, default=0.0),
        shuffles=times,
        agreement=spearman(np.array([share[n] for n in TERM_NAMES]), final),
        members=len(fitness),
        trees=trees,
    )


def _fanova(table: Array, fitness: Array, *, trees: int) -> dict[str, float] | None:
    """Shares by term of weights (members, terms); None where no tree finds anything to split."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: FloatDistribution(0.0, 1.0) for name in TERM_NAMES}
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        [
            create_trial(
                params=dict(zip(TERM_NAMES, np.clip(row, 0, 1).tolist(), strict=True)),
                distributions=dict(space),
                value=float(value),
            )
            for row, value in zip(table, fitness, strict=True)
        ]
    )
    try:
        found = FanovaImportanceEvaluator(n_trees=trees, seed=0).evaluate(study)
    except RuntimeError:  # no variance in any tree
        return None
    return {name: float(found.get(name, 0.0)) for name in TERM_NAMES}
