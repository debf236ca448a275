"""What a run folder holds, read without trust: its members, the best loss so far, lineage and comparisons.

A run may still be going, and its files come from a machine that may have died: every key is optional, a file
that can't be read is kept as a note, and nothing here draws or writes.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.objective.terms import BY_NAME, TERM_NAMES

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stat:
    """A mean, its standard deviation (None where there is one value only) and the number of values."""

    mean: float
    sd: float | None
    n: int
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Trial:
    """One finished member of the search."""

    number: int
    fitness: float | None
    """None for a member that failed."""
    weights: Mapping[str, float]
    reason: str = ""
    parent: int | None = None
    mutated: str | None = None
    round: int | None = None
    """0 for the initial population."""
    seconds: float | None = None
    metrics: Mapping[str, float] | None = None
    terms: Mapping[str, float] | None = None
    """Last mean value of each loss term."""


@dataclass(frozen=True)
class Step:
    """One mutation on the way from the initial population to the best member."""

    trial: int
    term: str | None
    before: float | None
    after: float | None
    fitness_before: float | None
    fitness_after: float | None


@dataclass(frozen=True)
class Comparison:
    """Best against random losses, both trained again with fresh seeds."""

    best: Stat
    random: Stat
    gain: float
    pooled_sds: float | None
    """The gain in pooled standard deviations; None where neither side has a spread."""


@dataclass(frozen=True)
class Run:
    """A run folder as it is now."""

    folder: Path
    recipe: Mapping[str, Any]
    provenance: Mapping[str, Any]
    summary: Mapping[str, Any]
    """Empty while the run goes on."""
    trials: tuple[Trial, ...]
    """By number."""
    unread: tuple[str, ...] = ()
    """Files that could not be read, each with why."""

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """The members that have a fitness."""
        return tuple(t for t in self.trials if t.fitness is not None)

    @cached_property
    def failed(self) -> tuple[Trial, ...]:
        """The members that have none."""
        return tuple(t for t in self.trials if t.fitness is None)

    @cached_property
    def improvements(self) -> tuple[Trial, ...]:
        """The members that were fitter than all before them: best-so-far changes there and nowhere else."""
        found: list[Trial] = []
        for trial in self.complete:
            if not found or fitness_of(trial) > fitness_of(found[-1]):
                found.append(trial)
        return tuple(found)

    @cached_property
    def by_number(self) -> dict[int, Trial]:
        """Trials by number."""
        return {t.number: t for t in self.trials}

    @cached_property
    def best(self) -> Trial | None:
        """The member that the summary names, else the fittest so far; None before any is complete."""
        named = self.by_number.get(_integer(self.summary.get("best_trial"), -1))
        if named is not None and named.fitness is not None:
            return named
        return self.improvements[-1] if self.improvements else None

    @cached_property
    def weights(self) -> dict[str, float] | None:
        """The best loss: every term's weight; None before any member is complete."""
        given = self.summary.get("weights")
        if isinstance(given, Mapping) and given:
            return _weights(given)
        return dict(self.best.weights) if self.best else None

    @cached_property
    def initial(self) -> tuple[Trial, ...]:
        """The initial population's members, failed ones included."""
        return tuple(t for t in self.trials if t.round == 0)

    @cached_property
    def name(self) -> str:
        """The recipe's name and the folder's."""
        recipe = str(self.recipe.get("name", "")).strip()
        return recipe or self.folder.resolve().name

    @cached_property
    def num_fittest(self) -> int:
        """How many of the fittest members the curves average: a quarter of the population, at least 3."""
        section = self.recipe.get("search")
        population = _integer(section.get("population"), 12) if isinstance(section, Mapping) else 12
        return max(3, population // 4)


def fitness_of(trial: Trial) -> float:
    """A complete member's fitness."""
    assert trial.fitness is not None
    return trial.fitness


def number(value: object) -> float | None:
    """``value`` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _integer(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _weights(given: object) -> dict[str, float]:
    known = given if isinstance(given, Mapping) else {}
    return {name: number(known.get(name)) or 0.0 for name in TERM_NAMES}


def _numbers(given: object) -> dict[str, float]:
    items = given.items() if isinstance(given, Mapping) else ()
    return {str(k): x for k, v in items if (x := number(v)) is not None}


def read_run(folder: Path) -> Run:
    """Read a run folder: recipe.toml, provenance.json, members/*.json and, at the end, summary.json.

    Raises ValueError where the folder holds none of them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run")
    unread: list[str] = []
    recipe = _read(folder / "recipe.toml", unread=unread)
    provenance = _read(folder / "provenance.json", unread=unread)
    summary = _read(folder / "summary.json", unread=unread)
    trials: dict[int, Trial] = {}
    for path in sorted((folder / "members").glob("[0-9]*.json")):
        row = _read(path, unread=unread)
        index = _integer(row.get("trial"), -1)
        if index >= 0:
            trials[index] = _trial(index, row)
        elif row:
            unread.append(f"{path.name}: no trial number")
    if not (recipe or provenance or summary or trials or unread):
        raise ValueError(
            f"{folder}: not a run folder (no recipe.toml, provenance.json or members); "
            "give the folder that engine evolve wrote"
        )
    in_order = tuple(trials[k] for k in sorted(trials))
    return Run(folder, recipe, provenance, summary, in_order, tuple(unread))


def _read(path: Path, *, unread: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        unread.append(f"{path.name}: {error}")
        return {}
    if not isinstance(value, dict):
        unread.append(f"{path.name}: not a table of keys")
        return {}
    return value


def _trial(index: int, row: Mapping[str, Any]) -> Trial:
    fitness = number(row.get("fitness")) if row.get("state", "complete") == "complete" else None
    reason = str(row.get("reason") or "") or ("" if fitness is not None else "no reason recorded")
    mutated = row.get("mutated")
    parent = _integer(row.get("parent"), -1)
    birth = _integer(row.get("round"), -1)
    return Trial(
        number=index,
        fitness=fitness,
        weights=_weights(row.get("weights")),
        reason=reason,
        parent=parent if parent >= 0 else None,
        mutated=mutated if isinstance(mutated, str) and mutated in BY_NAME else None,
        round=birth if birth >= 0 else None,
        seconds=number(row.get("seconds")),
        metrics=_numbers(row.get("metrics")),
        terms=_numbers(row.get("terms")),
    )


def stat(given: object) -> Stat | None:
    """A Stat from the summary's ``{"mean", "sd", "n", "values"}``, None where there is no mean."""
    if not isinstance(given, Mapping) or (mean := number(given.get("mean"))) is None:
        return None
    listed = given.get("values")
    raw = listed if isinstance(listed, Sequence) and not isinstance(listed, str) else ()
    values = tuple(x for v in raw if (x := number(v)) is not None)
    n = _integer(given.get("n"), max(1, len(values)))
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
