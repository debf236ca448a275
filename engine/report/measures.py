"""What a run's numbers come to: means and spreads, lineage, the fittest so far, failures, throughput, agreement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.objective.terms import TERM_NAMES
from engine.report.run import Array, Run, fitness_of, table_of, whole
from engine.search.members import Trial, finite, finite_values

if TYPE_CHECKING:
    from engine.features.reliability import Reliability
    from engine.search.effects import Effects


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


def stat(run: Run, key: str) -> Stat | None:
    """A Stat from the summary's ``{"mean", "sd", "n", "values"}`` under a key; None where there is no mean."""
    return stat_in(run.summary, key)


def stat_in(tables: Mapping[str, Any], key: str) -> Stat | None:
    """A Stat from such an entry of a table of tables."""
    table = table_of(tables, key)
    if (mean := finite(table.get("mean"))) is None:
        return None
    raw = table.get("values")
    numbers = map(finite, raw if isinstance(raw, list) else ())
    values = tuple(x for x in numbers if x is not None)
    n = whole(table.get("n"), max(1, len(values)))
    return Stat(mean, finite(table.get("sd")) if n > 1 else None, n, values)


def stat_of(values: Sequence[float]) -> Stat | None:
    """Mean and sd of values; None where there are none."""
    if not values:
        return None
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return Stat(float(np.mean(values)), sd, len(values), tuple(values))


def initial_stat(run: Run) -> Stat | None:
    """The initial population's fitness: the summary's, else from the members that are complete."""
    values = [fitness_of(t) for t in run.initial if t.fitness is not None]
    return stat(run, "initial_population") or stat_of(values)


def luckiest(run: Run) -> tuple[Stat | None, int]:
    """The fittest of several trainings of random losses with fresh seeds, and how many they are."""
    count = whole(table_of(run.summary, "luckiest_random").get("of"), 0)
    return stat(run, "luckiest_random") if count > 1 else None, count


def pooled_sds(one: Stat, other: Stat) -> float | None:
    """The difference of two means in pooled standard deviations; None where a side has one value, or none differ.

    The pooled variance weighs each side's by its n - 1.
    """
    if one.sd is None or other.sd is None:
        return None
    squares = (one.n - 1) * one.sd**2 + (other.n - 1) * other.sd**2
    pooled = math.sqrt(squares / (one.n + other.n - 2))
    return (one.mean - other.mean) / pooled if pooled > 0 else None


def ranking(run: Run) -> Reliability | None:
    """How well one training ranks losses; None where there are not two losses, or no loss has two seeds.

    Losses differ as the initial population does; seeds as its repeats do, and the losses that fresh seeds confirmed.
    What takes no learning, or was trained with labels, says nothing of a member's seeds.
    """
    # Only here: they take seconds, and a list of runs has no ranks.
    from engine.data.demo.levels import WITH_LABELS
    from engine.features.reliability import reliability
    from engine.features.trivial import TRIVIAL

    initial = [t for t in run.initial if t.fitness is not None]
    first = [_repeats(t) for t in initial]
    most = max(map(len, first), default=0)
    compared = table_of(run.summary, "compared")
    fresh = [stat_in(compared, name) for name in compared if name not in (*TRIVIAL, WITH_LABELS)]
    # each loss once: the best may be one of those that it is compared with
    values = {s.values for s in (stat(run, "best"), *fresh) if s is not None}
    longest = max(map(len, values), default=0)
    again = sorted(each for each in values if len(each) == longest)
    tables = [again] if again else []
    if len({str(t.attributes.get("seeds")) for t in initial}) > 1:
        tables = [[row] for row in again]  # what a seed does to all losses tells members apart, too
    try:
        return reliability([r for r in first if len(r) == most], *tables)
    except ValueError:
        return None


def _repeats(trial: Trial) -> list[float]:
    """A member's fitness, one for each of its trainings."""
    rows = trial.attributes.get("repeats")
    values = [finite_values(row).get("fitness") for row in (rows if isinstance(rows, list) else ())]
    return [v for v in values if v is not None] or [fitness_of(trial)]


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


def failures(run: Run) -> list[tuple[str, list[int]]]:
    """Every reason for which members failed, with their trial numbers, most frequent first."""
    groups: dict[str, list[int]] = {}
    for trial in run.failed:
        groups.setdefault(trial.reason, []).append(trial.number)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))


def throughput(run: Run) -> dict[str, float]:
    """How fast the members went, by name; what the run does not say is left out."""
    took = [t.seconds for t in run.trials if t.seconds is not None]
    rates = [t.clips_per_second for t in run.complete if t.clips_per_second]
    total, train = run.seconds.get("total") or 0.0, run.seconds.get("train")
    speed: dict[str, float] = {}
    if total > 0 and run.trials:
        speed["members an hour"] = 3600 * len(run.trials) / total
    if rates:
        speed["training clips a second, median member"] = float(np.median(rates))
    if took:
        speed["seconds a member, median"] = float(np.median(took))
        speed["seconds of the slowest member"] = max(took)
    if train is not None and total > 0:
        speed["training's share of the time, %"] = 100 * train / total
    return speed


@dataclass(frozen=True)
class Incident:
    """All events of one kind."""

    kind: str
    count: int
    trials: list[int]
    """The members that it struck, without repeats."""
    details: list[str]
    """What was said, without repeats, most frequent first."""


def incidents(run: Run) -> list[Incident]:
    """The run's events by kind, most frequent first."""
    rows = []
    for kind, count in Counter(e.kind for e in run.events).most_common():
        events = [e for e in run.events if e.kind == kind]
        details = Counter(e.detail for e in events if e.detail)
        trials = sorted({k for e in events for k in e.trials})
        rows.append(Incident(kind, count, trials, [text for text, _ in details.most_common()]))
    return rows


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
    rhos = [r for r in (spearman(*table[d].T) for d in draws) if r is not None]
    low, high = np.quantile(rhos, (0.025, 0.975)).tolist() if rhos else (None, None)
    return Agreement(len(both), rho, low, high, tuple(both))


def spearman(x: Array, y: Array) -> float | None:
    """Rank correlation of two series, ties at their mean rank; None where one is constant."""
    # Imported only here: it takes a second, and a list of runs has no ranks.
    from scipy.stats import spearmanr  # type: ignore[import-untyped]

    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    return None if constant else float(spearmanr(x, y).statistic)


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

    @cached_property
    def effects(self) -> Effects | None:
        """Each term's effect on fitness, from the members of all runs; None where there are too few."""
        from engine.search.effects import effects_of  # only here: a list of runs does without

        return effects_of([trial for run in self.runs for trial in run.trials])

    def side(self, key: str) -> Stat | None:
        """Fitness with fresh seeds over the runs: mean and sd of the runs' means, n runs.

        Of a single run, mean and sd over its fresh seeds.
        """
        stats = [s for run in self.runs if (s := stat(run, key)) is not None]
        return stats[0] if len(stats) == 1 else stat_of([s.mean for s in stats])


def best_so_far(run: Run) -> Array:
    """Best fitness so far after each member, in the order of trials."""
    values = [t.fitness if t.fitness is not None else -np.inf for t in run.trials]
    best = np.maximum.accumulate(np.array(values, dtype=np.float64)) if values else np.empty(0)
    curve: Array = np.where(np.isfinite(best), best, np.nan)
    return curve
