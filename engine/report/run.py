"""What a run folder holds, read without trust: its members, the best loss so far, events and time.

A run may still be going, and its files come from a machine that may have died: every key is optional, a file
that can't be read is kept as a note, and nothing here draws or writes.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engine.objective.terms import BY_NAME, TERM_NAMES

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Trial:
    """One finished member of the search."""

    number: int
    fitness: float | None
    """None for a member that failed or was pruned."""
    weights: Mapping[str, float]
    state: Literal["complete", "failed", "pruned"] = "complete"
    reason: str = ""
    """Why it failed."""
    partial: float | None = None
    """A pruned member's last fitness, measured before its training ended."""
    parent: int | None = None
    mutated: str | None = None
    round: int | None = None
    """0 for the initial population."""
    seconds: float | None = None
    clips_per_second: float | None = None
    """Training clips a second while it was trained; its share where a cohort took turns."""
    metrics: Mapping[str, float] | None = None
    terms: Mapping[str, float] | None = None
    """Last mean value of each loss term."""


@dataclass(frozen=True)
class Event:
    """Something that went wrong or was done about it: a line of events.jsonl."""

    kind: str
    """Such as worker_died, retry, time_limit, out_of_memory, non_finite, storage, resumed."""
    trials: tuple[int, ...]
    time: float | None
    """Unix seconds."""
    worker: str
    detail: str


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
    events: tuple[Event, ...] = ()
    """In the file's order."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage and ``total``: the summary's, or while the run goes on timing.json's."""
    unread: tuple[str, ...] = ()
    """Files that could not be read, each with why."""

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """The members that have a fitness."""
        return tuple(t for t in self.trials if t.fitness is not None)

    @cached_property
    def failed(self) -> tuple[Trial, ...]:
        """The members that ended without one."""
        return tuple(t for t in self.trials if t.state == "failed")

    @cached_property
    def pruned(self) -> tuple[Trial, ...]:
        """The members whose training was ended early since others of their cohort did better."""
        return tuple(t for t in self.trials if t.state == "pruned")

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
        named = self.by_number.get(whole(self.summary.get("best_trial"), -1))
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
    def method(self) -> str:
        """How weights were proposed: ``search.method`` of the recipe."""
        section = self.recipe.get("search")
        known = section.get("method", "evolution") if isinstance(section, Mapping) else "evolution"
        return str(known)

    @cached_property
    def evolved(self) -> bool:
        """Whether any member was made from another."""
        return any(t.parent is not None for t in self.trials)

    @cached_property
    def turn(self) -> int | None:
        """The initial population's last trial; None where nothing follows it or all members are alike."""
        if self.method in ("random", "grid") or not self.initial:
            return None
        last = self.initial[-1].number
        return last if last < self.trials[-1].number else None

    @cached_property
    def name(self) -> str:
        """The recipe's name and the folder's."""
        recipe = str(self.recipe.get("name", "")).strip()
        return recipe or self.folder.resolve().name

    @cached_property
    def num_fittest(self) -> int:
        """How many of the fittest members the curves average: a quarter of the population, at least 3."""
        section = self.recipe.get("search")
        population = whole(section.get("population"), 12) if isinstance(section, Mapping) else 12
        return max(3, population // 4)

    def round_of(self, number: int) -> int:
        """The round of the search that a trial belongs to; 0 for the initial population."""
        trial = self.by_number.get(number)
        known = trial.round if trial else None
        return max(0, number - len(self.initial) + 1) if known is None else known


def fitness_of(trial: Trial) -> float:
    """A complete member's fitness."""
    assert trial.fitness is not None
    return trial.fitness


def number(value: object) -> float | None:
    """``value`` as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: object, default: int) -> int:
    """``value`` as a whole number, else ``default``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _weights(given: object) -> dict[str, float]:
    known = given if isinstance(given, Mapping) else {}
    return {name: number(known.get(name)) or 0.0 for name in TERM_NAMES}


def _numbers(given: object) -> dict[str, float]:
    items = given.items() if isinstance(given, Mapping) else ()
    return {str(k): x for k, v in items if (x := number(v)) is not None}


def read_run(folder: Path) -> Run:
    """Read a run folder: recipe.toml, provenance.json, members/*.json, timing.json, events.jsonl, summary.json.

    Raises ValueError where the folder holds none of them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run")
    unread: list[str] = []
    recipe = _read(folder / "recipe.toml", unread=unread)
    provenance = _read(folder / "provenance.json", unread=unread)
    summary = _read(folder / "summary.json", unread=unread)
    trials = _members(folder, unread=unread)
    if not (recipe or provenance or summary or trials or unread):
        raise ValueError(
            f"{folder}: not a run folder (no recipe.toml, provenance.json or members); "
            "give the folder that engine evolve wrote"
        )
    return Run(
        folder,
        recipe,
        provenance,
        summary,
        trials=trials,
        events=_events(folder / "events.jsonl", unread=unread),
        seconds=_numbers(summary.get("seconds") or _read(folder / "timing.json", unread=unread)),
        unread=tuple(unread),
    )


def _members(folder: Path, *, unread: list[str]) -> tuple[Trial, ...]:
    """The members that ended, by number."""
    trials: dict[int, Trial] = {}
    for path in sorted((folder / "members").glob("[0-9]*.json")):
        row = _read(path, unread=unread)
        index = whole(row.get("trial"), -1)
        if index >= 0:
            trials[index] = _trial(index, row)
        elif row:
            unread.append(f"{path.name}: no trial number")
    return tuple(trials[k] for k in sorted(trials))


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


def _events(path: Path, *, unread: list[str]) -> tuple[Event, ...]:
    """Every whole line; a process that died may have left half of one."""
    found: list[Event] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        unread.append(f"{path.name}: {error}")
        return ()
    for count, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            if line.strip():
                unread.append(f"{path.name}, line {count}: not an event")
            continue
        given = row.get("trials")
        trials = given if isinstance(given, list) else []
        worker = row.get("worker")
        found.append(
            Event(
                kind=row["kind"],
                trials=tuple(k for k in trials if whole(k, -1) >= 0),
                time=number(row.get("time")),
                worker="" if worker is None else str(worker),
                detail=str(row.get("detail") or ""),
            )
        )
    return tuple(found)


def _trial(index: int, row: Mapping[str, Any]) -> Trial:
    given, fitness = row.get("state", "complete"), number(row.get("fitness"))
    pruned = given == "pruned"
    done = given == "complete" and fitness is not None
    reason = "" if done or pruned else str(row.get("reason") or "no reason recorded")
    mutated = row.get("mutated")
    parent = whole(row.get("parent"), -1)
    birth = whole(row.get("round"), -1)
    return Trial(
        number=index,
        fitness=fitness if done else None,
        weights=_weights(row.get("weights")),
        state="pruned" if pruned else "complete" if done else "failed",
        reason=reason,
        partial=fitness if pruned else None,
        parent=parent if parent >= 0 else None,
        mutated=mutated if isinstance(mutated, str) and mutated in BY_NAME else None,
        round=birth if birth >= 0 else None,
        seconds=number(row.get("seconds")),
        clips_per_second=number(row.get("clips_per_second")),
        metrics=_numbers(row.get("metrics")),
        terms=_numbers(row.get("terms")),
    )
