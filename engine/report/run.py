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
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from engine.core.run import study_file
from engine.objective.terms import TERM_NAMES
from engine.search.members import Trial, finite, finite_values
from engine.search.study import read_trials

if TYPE_CHECKING:
    from engine.search.effects import Effects

Array = npt.NDArray[np.float64]


class Event(msgspec.Struct, frozen=True):
    """Something that went wrong or was done about it: a line of events.jsonl."""

    kind: str
    """Such as worker_died, retry, time_limit, out_of_memory, non_finite, storage, resumed."""
    trials: tuple[int, ...] = ()
    detail: str = ""


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
        best: list[Trial] = []
        for trial in self.complete:
            if not best or fitness_of(trial) > fitness_of(best[-1]):
                best.append(trial)
        return tuple(best)

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
        if weights := table_of(self.summary, "weights"):
            return {name: finite(weights.get(name)) or 0.0 for name in TERM_NAMES}
        return dict(self.best.weights) if self.best else None

    @cached_property
    def initial(self) -> tuple[Trial, ...]:
        """The initial population's members, failed ones included."""
        return tuple(t for t in self.trials if t.round == 0)

    @cached_property
    def method(self) -> str:
        """How weights were proposed: ``search.method`` of the recipe."""
        return str(table_of(self.recipe, "search").get("method", "evolution"))

    @cached_property
    def sparse(self) -> bool:
        """Whether losses have weights of exactly 0 by their prior: ``search.sparsity`` of the recipe."""
        return bool(table_of(self.recipe, "search").get("sparsity", 0))

    @cached_property
    def effects(self) -> Effects | None:
        """Each term's effect on fitness; None where there are too few members."""
        from engine.search.effects import effects_of  # only here: a list of runs does without

        return effects_of(self.trials)

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
        return max(3, whole(table_of(self.recipe, "search").get("population"), 12) // 4)


def fitness_of(trial: Trial) -> float:
    """A complete member's fitness."""
    assert trial.fitness is not None
    return trial.fitness


def whole(value: object, default: int) -> int:
    """``value`` as a whole number, else ``default``."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def table_of(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The table under a key; empty where there is none."""
    table = values.get(key)
    return table if isinstance(table, Mapping) else {}


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
    trials = _study(folder, unread=unread)
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


def _study(folder: Path, *, unread: list[str]) -> list[Trial]:
    """A run's finished members, wherever its study lies; none, and a note, where that can't be read."""
    storage = _read(folder / "storage.json", unread=unread)
    place: str | Path = str(storage["url"]) if "url" in storage else study_file(folder)
    if isinstance(place, Path) and not place.exists():
        return []
    try:
        return read_trials(place, name=str(storage.get("study", "evolve")))
    except (OSError, ValueError) as error:
        unread.append(f"study: {error}")
        return []


def _read(path: Path, *, unread: list[str]) -> dict[str, Any]:
    """A file's table of keys; empty, and a note, where it can't be read."""
    decode = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        table = decode(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("not a table of keys")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        unread.append(f"{path.name}: {error}")
        return {}
    return table


def _events(path: Path, *, unread: list[str]) -> tuple[Event, ...]:
    """Every whole line; a process that died may have left half of one."""
    events: list[Event] = []
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    except OSError as error:
        unread.append(f"{path.name}: {error}")
        return ()
    for count, line in enumerate(lines, start=1):
        try:
            if line.strip():
                events.append(msgspec.json.decode(line, type=Event))
        except ValueError:
            unread.append(f"{path.name}, line {count}: not an event")
    return tuple(events)
