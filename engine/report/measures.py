"""What a run's numbers come to: means and spreads, lineage, the fittest so far, failures, throughput, agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.objective.terms import TERM_NAMES
from engine.report.run import Array, Run, fitness_of, number, whole


@dataclass(frozen=True)
class Stat:
    """A mean, its standard deviation (None where there is one value only) and the number of values."""

    mean: float
    sd: float | None
    n: int
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One mutation on the way from the initial population to the best member."""

    trial: int
    term: str | None
    before: float | None
    after: float | None
    fitness_before: float | None
    fitness_after: float | None

    @property
    def gain(self) -> float | None:
        """The child's fitness less its parent's."""
        if self.fitness_before is None or self.fitness_after is None:
            return None
        return self.fitness_after - self.fitness_before


@dataclass(frozen=True)
class Comparison:
    """Best against random losses, both trained again with fresh seeds."""

    best: Stat
    random: Stat
    gain: float
    pooled_sds: float | None
    """The gain in pooled standard deviations; None where neither side has a spread."""


def stat(given: object) -> Stat | None:
    """A Stat from the summary's ``{"mean", "sd", "n", "values"}``, None where there is no mean."""
    if not isinstance(given, Mapping) or (mean := number(given.get("mean"))) is None:
        return None
    listed = given.get("values")
    raw = listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ()
    values = tuple(x for v in raw if (x := number(v)) is not None)
    n = whole(given.get("n"), max(1, len(values)))
    return Stat(mean, number(given.get("sd")) if n > 1 else None, n, values)


def initial_stat(run: Run) -> Stat | None:
    """The initial population's fitness: the summary's, else from the members that are complete."""
    if (given := stat(run.summary.get("initial_population"))) is not None:
        return given
    values = tuple(fitness_of(t) for t in run.initial if t.fitness is not None)
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Stat(float(np.mean(values)), sd, len(values), values)


def compare(run: Run) -> Comparison | None:
    """Best against random with fresh seeds; None while the run has not measured both.

    The pooled variance weighs each side's by its n - 1.
    """
    best, random = stat(run.summary.get("best")), stat(run.summary.get("random"))
    if best is None or random is None:
        return None
    spread = [(s.n - 1, s.sd) for s in (best, random) if s.sd is not None]
    freedom = sum(n for n, _ in spread)
    pooled = math.sqrt(sum(n * sd * sd for n, sd in spread) / freedom) if freedom else 0.0
    gain = best.mean - random.mean
    return Comparison(best, random, gain, gain / pooled if pooled > 0 else None)


def lineage(run: Run) -> tuple[Step, ...]:
    """The mutations from the initial population to the best member, oldest first."""
    steps: list[Step] = []
    child, seen = run.best, set[int]()
    while child is not None and child.parent is not None and child.number not in seen:
        seen.add(child.number)
        parent = run.by_number.get(child.parent)
        term = child.mutated
        before = parent.weights[term] if parent and term else None
        after = child.weights[term] if term else None
        was = parent.fitness if parent else None
        steps.append(Step(child.number, term, before, after, was, child.fitness))
        child = parent
    return tuple(reversed(steps))


def ancestor(run: Run) -> int | None:
    """The trial that the best member's lineage starts from."""
    steps = lineage(run)
    if steps:
        return run.by_number[steps[0].trial].parent
    return run.best.number if run.best else None


def fittest_means(run: Run) -> tuple[Array, Array]:
    """Mean weights of the fittest members so far, after every complete trial.

    Returns trial numbers (M,) and weights (M, terms); the mean is over ``run.num_fittest`` members, or over as
    many as there are. Rows equal to the one before are left out, save the last.
    """
    top: list[tuple[float, int]] = []
    table = np.array([[t.weights[n] for n in TERM_NAMES] for t in run.complete], dtype=np.float64)
    at: list[float] = []
    rows: list[Array] = []
    for i, trial in enumerate(run.complete):
        entry = (fitness_of(trial), -i)
        if len(top) < run.num_fittest or entry > top[-1]:
            top = sorted([*top, entry], reverse=True)[: run.num_fittest]
            at.append(float(trial.number))
            rows.append(table[[-j for _, j in top]].mean(axis=0))
    if rows and at[-1] != run.complete[-1].number:
        at.append(float(run.complete[-1].number))
        rows.append(rows[-1])
    return np.array(at), np.array(rows).reshape(len(rows), len(TERM_NAMES))


def failures(run: Run) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Every reason for which members failed, with their trial numbers, most frequent first."""
    groups: dict[str, list[int]] = {}
    for trial in run.failed:
        groups.setdefault(trial.reason, []).append(trial.number)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))
    return tuple((reason, tuple(numbers)) for reason, numbers in ordered)


@dataclass(frozen=True)
class Throughput:
    """How fast the members went; None where the run does not say."""

    members_per_hour: float | None
    """Members that ended, by the whole run's hours."""
    seconds: float | None
    """Median of a member's training and scoring."""
    slowest: float | None
    """The longest of them."""
    clips_per_second: float | None
    """Median of the members' training clips a second."""
    training_share: float | None
    """Training's share of the whole run's time."""


def throughput(run: Run) -> Throughput:
    """How fast the run went."""
    took = [t.seconds for t in run.trials if t.seconds is not None]
    rates = [t.clips_per_second for t in run.complete if t.clips_per_second]
    total = run.seconds.get("total") or 0.0
    train = run.seconds.get("train")
    return Throughput(
        members_per_hour=3600 * len(run.trials) / total if total > 0 and run.trials else None,
        seconds=float(np.median(took)) if took else None,
        slowest=max(took, default=None),
        clips_per_second=float(np.median(rates)) if rates else None,
        training_share=train / total if train is not None and total > 0 else None,
    )


@dataclass(frozen=True)
class Incident:
    """All events of one kind."""

    kind: str
    count: int
    trials: tuple[int, ...]
    """The members that it struck, without repeats."""
    details: tuple[str, ...]
    """What was said, without repeats, most frequent first."""


def incidents(run: Run) -> tuple[Incident, ...]:
    """The run's events by kind, most frequent first."""
    kinds = Counter(e.kind for e in run.events)
    found = []
    for kind, count in kinds.most_common():
        mine = [e for e in run.events if e.kind == kind]
        said = Counter(e.detail for e in mine if e.detail)
        struck = sorted({k for e in mine for k in e.trials})
        found.append(Incident(kind, count, tuple(struck), tuple(d for d, _ in said.most_common())))
    return tuple(found)


def recovered(run: Run) -> tuple[int, ...]:
    """The members that an event struck and that have a fitness all the same."""
    struck = {k for e in run.events if e.kind != "resumed" for k in e.trials}
    return tuple(t.number for t in run.complete if t.number in struck)


@dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation of two ways to measure fitness, over the members that have both."""

    n: int
    rho: float | None
    """None where one of the two never changes."""
    low: float | None
    """Lower end of a 95 % bootstrap interval over members."""
    high: float | None
    pairs: tuple[tuple[float, float], ...]
    """The members' values, x first."""


def agreement(run: Run, x: str, y: str) -> Agreement | None:
    """How far two metrics rank the complete members alike; None where fewer than three have both.

    The interval resamples members 1,000 times, with a fixed seed.
    """
    both = [
        (t.metrics[x], t.metrics[y]) for t in run.complete if t.metrics and {x, y} <= set(t.metrics)
    ]
    if len(both) < 3:
        return None
    table = np.array(both, dtype=np.float64)
    rho = spearman(table[:, 0], table[:, 1])
    draws = np.random.default_rng(0).integers(0, len(both), (1000, len(both)))
    known = [r for r in (spearman(*table[d].T) for d in draws) if r is not None]
    low, high = np.quantile(known, (0.025, 0.975)).tolist() if known else (None, None)
    return Agreement(len(both), rho, low, high, tuple(both))


def spearman(x: Array, y: Array) -> float | None:
    """Rank correlation of two series, ties at their mean rank; None where one is constant."""
    # Imported only here: it takes a second, and a list of runs has no ranks.
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(rankdata(x), rankdata(y))[0, 1])


@dataclass(frozen=True)
class Group:
    """Runs of one recipe with different seeds."""

    label: str
    runs: tuple[Run, ...]

    @cached_property
    def curves(self) -> tuple[Array, ...]:
        """Best fitness so far after each member, a run each; before the first with a fitness it is nan."""
        return tuple(best_so_far(run) for run in self.runs)

    @cached_property
    def band(self) -> tuple[Array, Array]:
        """Mean and sd over all runs, after each member that all of them have; sd 0 where there is one run.

        Where the first members of a run have no fitness, nan.
        """
        members = min(len(curve) for curve in self.curves)
        table = np.array([curve[:members] for curve in self.curves])
        several = len(table) > 1
        return table.mean(axis=0), table.std(axis=0, ddof=1) if several else np.zeros(members)

    def side(self, key: str) -> Stat | None:
        """Fitness with fresh seeds over the runs: mean and sd of the runs' means, n runs.

        Of a single run, mean and sd over its fresh seeds.
        """
        known = [s for run in self.runs if (s := stat(run.summary.get(key))) is not None]
        if len(known) < 2:
            return known[0] if known else None
        means = tuple(s.mean for s in known)
        return Stat(float(np.mean(means)), float(np.std(means, ddof=1)), len(means), means)


def best_so_far(run: Run) -> Array:
    """Best fitness so far after each member, in the order of trials."""
    values = [t.fitness if t.fitness is not None else -np.inf for t in run.trials]
    best = np.maximum.accumulate(np.array(values, dtype=np.float64)) if values else np.empty(0)
    found: Array = np.where(np.isfinite(best), best, np.nan)
    return found
