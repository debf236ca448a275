"""What a run folder holds, read without trust: its members, the best loss so far, events and time.

A run may still be going, and its files come from a machine that may have died: every key is optional, a file
that can't be read is kept as a note, and nothing here draws or writes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.core.runfolder import study_file
from engine.objective.terms import TERM_NAMES
from engine.search.samplers import Trial, finite, finite_values
from engine.search.study import read_trials

Array = npt.NDArray[np.float64]
number = finite


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
        return max(0, number - len(self.initial) + 1) if trial is None else trial.round


def fitness_of(trial: Trial) -> float:
    """A complete member's fitness."""
    assert trial.fitness is not None
    return trial.fitness


def whole(value: object, default: int) -> int:
    """``value`` as a whole number, else ``default``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _weights(given: object) -> dict[str, float]:
    known = given if isinstance(given, Mapping) else {}
    return {name: number(known.get(name)) or 0.0 for name in TERM_NAMES}


def read_run(folder: Path) -> Run:
    """Read a run folder: recipe.toml, provenance.json, the study, timing.json, events.jsonl, summary.json.

    Raises ValueError where the folder holds none of them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run")
    unread: list[str] = []
    recipe = _read(folder / "recipe.toml", unread=unread)
    provenance = _read(folder / "provenance.json", unread=unread)
    summary = _read(folder / "summary.json", unread=unread)
    trials = read_study(folder, unread=unread)
    if not (recipe or provenance or summary or trials or unread):
        raise ValueError(
            f"{folder}: not a run folder (no recipe.toml, provenance.json or study); "
            "give the folder that engine evolve wrote"
        )
    return Run(
        folder,
        recipe,
        provenance,
        summary,
        trials=tuple(trials),
        events=_events(folder / "events.jsonl", unread=unread),
        seconds=finite_values(
            summary.get("seconds") or _read(folder / "timing.json", unread=unread)
        ),
        unread=tuple(unread),
    )


def read_study(folder: Path, *, unread: list[str]) -> list[Trial]:
    """A run's finished members, wherever its study lies; none, and a note, where that can't be read."""
    noted = _read(folder / "storage.json", unread=unread)
    place: str | Path = str(noted["url"]) if "url" in noted else study_file(folder)
    if isinstance(place, Path) and not place.exists():
        return []
    try:
        return read_trials(place, name=str(noted.get("study", "evolve")))
    except (OSError, ValueError) as error:
        unread.append(f"study: {error}")
        return []


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
