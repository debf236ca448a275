"""Whether a fitness ranks losses: how much of its spread comes from losses, and how much from seeds.

Shape letters: L losses, S seeds. The model is fitness[l, s] = mean + loss[l] + seed[s] + noise[l, s].
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import trapezoid  # type: ignore[import-untyped]
from scipy.stats import bootstrap, norm, spearmanr  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95
TWO_SIDED, POWER = 0.05, 0.8
"""Error rates of telling two losses apart: of seeing a difference that is none, and of seeing one that is."""
ROUNDING = 1e-9
"""Spreads of fitness below this are float64's rounding."""
MOST_MEMBERS = 10_000


@dataclass(frozen=True)
class Reliability:
    """Spreads and rank correlations that say how well one training, or several, rank losses."""

    losses: int
    seeds: int
    spearman: float | None
    """Rank correlation of the means over two disjoint sets of seeds; None for fewer than three losses or one seed."""
    interval: tuple[float, float] | None
    """Its 95 % bootstrap interval over losses."""
    loss_spread: float
    """Standard deviation of fitness between losses, without what seeds add."""
    seed_spread: float
    """Standard deviation of one loss's fitness between seeds, less what a seed does to all losses alike."""

    @property
    def ratio(self) -> float:
        """Spread between losses over the spread between seeds; infinite where seeds make no difference."""
        if self.seed_spread == 0:
            return math.inf if self.loss_spread else 0.0
        return self.loss_spread / self.seed_spread

    def one(self, repeats: int = 1) -> float:
        """Share of the variance of a mean over ``repeats`` seeds that losses make: its expected correlation."""
        noise = self.seed_spread**2 / repeats
        total = self.loss_spread**2 + noise
        return self.loss_spread**2 / total if total else 0.0

    @property
    def repeats(self) -> float:
        """Trainings of each of two losses that tell them apart where they differ by one spread between losses.

        n = 2 (z(1 - a/2) + z(b))^2 / ratio^2, a = 5 % two-sided, b = 80 % power; infinite where losses do not differ.
        """
        if not self.ratio:
            return math.inf
        z = float(norm.ppf(1 - TWO_SIDED / 2) + norm.ppf(POWER))
        return max(1, math.ceil(2 * (z / self.ratio) ** 2)) if math.isfinite(self.ratio) else 1

    def members(self, repeats: int = 1) -> float:
        """Random members of which the fittest is expected to be one spread better than their mean.

        The least n with sqrt(one(repeats)) E[largest of n normal draws] >= 1; infinite beyond MOST_MEMBERS.
        """
        correlation = math.sqrt(self.one(repeats))
        counts = range(1, MOST_MEMBERS + 1)
        short = bisect_left(counts, 1.0, key=lambda n: expected_largest(n) * correlation)
        return counts[short] if short < len(counts) else math.inf


def reliability(scores: ArrayLike, *more: ArrayLike) -> Reliability:
    """Figures of fitness (L, S), a row a loss, a column a seed; losses with a value that is not finite are left out.

    The two sets of seeds are the first half of the columns and the rest. Further tables, of other losses or seeds,
    only add to what is known of the spread between seeds: a search with one training a member gives its members'
    fitness (L, 1), and its best loss's confirmations (1, S). A table of one loss can't tell what a seed does to all
    losses alike, which then counts as noise. Raises ValueError where there are not two losses, or no seed is repeated.
    """
    table = _clean(scores)
    tables = [table, *(_clean(each) for each in more)]
    if len(table) < 2:
        raise ValueError(f"reliability: {len(table)} losses have a fitness; at least two must")
    noise = _noise(tables)
    count = table.shape[1]
    between = float(np.var(table.mean(1), ddof=1)) - noise / count
    spearman, interval = _agreement(table) if count > 1 else (None, None)
    return Reliability(
        losses=len(table),
        seeds=count,
        spearman=spearman,
        interval=interval,
        loss_spread=_spread(between),
        seed_spread=_spread(noise),
    )


def _spread(variance: float) -> float:
    """A standard deviation; 0 where its variance is no more than rounding, or estimated below 0."""
    spread = math.sqrt(max(variance, 0.0))
    return spread if spread > ROUNDING else 0.0


def expected_largest(count: int) -> float:
    """Expectation of the largest of ``count`` standard normal draws, by quadrature of n z pdf(z) cdf(z)^(n-1)."""
    z = np.linspace(-10, 10, 4001)
    density = count * z * norm.pdf(z) * np.exp((count - 1) * norm.logcdf(z))
    return float(trapezoid(density, z))


def _clean(scores: ArrayLike) -> Floats:
    table = np.atleast_2d(np.asarray(scores, np.float64))
    return table[np.isfinite(table).all(1)]


def _noise(tables: Sequence[Floats]) -> float:
    """Variance of a loss's fitness between seeds: the residual of the two-way model, pooled over tables."""
    squares, freedom = 0.0, 0
    for table in tables:
        rows, columns = table.shape
        if not rows or columns < 2:
            continue
        left = table - table.mean(1, keepdims=True)
        if rows > 1:
            left = left - left.mean(0, keepdims=True)
        squares += float((left**2).sum())
        freedom += (columns - 1) * max(rows - 1, 1)
    if not freedom:
        raise ValueError("reliability: no loss was trained with two seeds")
    return squares / freedom


def _agreement(table: Floats) -> tuple[float | None, tuple[float, float] | None]:
    """Spearman's correlation between the halves of the columns, and its interval."""
    half = table.shape[1] // 2
    pair = (table[:, :half].mean(1), table[:, half:].mean(1))
    if len(table) < 3 or any(np.ptp(side) == 0 for side in pair):
        return None, None

    def statistic(first: Floats, second: Floats) -> float:
        return float(spearmanr(first, second).statistic)

    with warnings.catch_warnings():  # a resample may hold one loss alone
        warnings.simplefilter("ignore")
        drawn = bootstrap(
            pair,
            statistic,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=0,
        ).bootstrap_distribution
    edges = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [edges, 1 - edges])
    return statistic(*pair), (float(low), float(high))
