"""Search: asks for loss weights and is told their fitness; knows nothing of videos or training.

Members are numbered as the study's trials. How weights are proposed is the samplers' part, where they are kept the
storage's; this is the book-keeping between them: who is out, who is done, and who may be proposed next.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.recipe import Search
from engine.samplers import (
    CmaSampler,
    EvolutionSampler,
    GridSampler,
    MemberRecord,
    Proposal,
    RandomSampler,
    Sampler,
    State,
    generation_of,
)
from engine.samplers_optuna import OptunaSampler
from engine.study_storage import LINEAGE, StudyStorage

__all__ = ["MemberRecord", "Proposal", "SearchStudy"]

OURS = {
    "evolution": EvolutionSampler,
    "cmaes": CmaSampler,
    "random": RandomSampler,
    "grid": GridSampler,
}
"""Samplers of our own, by ``search.method``; other methods are Optuna's."""


class SearchStudy:
    """A study of loss weights, behind ask and tell; fitness is maximised.

    Creates the Optuna study ``name`` in ``storage``, or opens it if it exists: a Path is an SQLite file, a string any
    storage URL of Optuna's, None keeps it in memory alone. It is read once, here: one process at a time asks and tells,
    and another that does so too is noticed when it writes. While the database is away, every call waits up to
    ``patience`` seconds for it, and tells ``on_wait`` the reason once.

    Raises ValueError for settings that the method can't work with, a URL that can't be used, and a study that belongs
    to another recipe; and, as every method that writes, OSError where the storage can't be read or written.
    """

    def __init__(
        self,
        settings: Search,
        *,
        storage: str | Path | None,
        name: str,
        seed: int,
        recipe_hash: str,
        patience: float = 120.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        maker = OURS.get(settings.method, OptunaSampler)
        self._sampler: Sampler = maker(settings, seed=seed)
        self._storage: StudyStorage | None = None
        self._trials: list[Proposal] = []
        """By number; a MemberRecord if it is done."""
        if storage is not None:
            self._storage = StudyStorage(storage, name=name, patience=patience, on_wait=on_wait)
            self._trials = self._storage.load(recipe_hash)
        self._where = "memory" if self._storage is None else self._storage.where
        self._out: set[int] = set()
        """Trials handed out, and not yet told, failed, pruned or released."""
        self._waiting = [t.trial for t in self._trials if not isinstance(t, MemberRecord)]
        """Trials proposed that nobody has been handed, by number."""
        self._first_open = 0
        """No trial below it is open."""

    @property
    def total(self) -> int:
        """Members of the whole search: the initial population and one a round."""
        return self.settings.population + self.settings.rounds

    @property
    def finished(self) -> bool:
        """Whether all ``total`` members are done."""
        return self._all_done_below(self.total)

    def ask(self, limit: int | None = None) -> list[Proposal]:
        """Members to train next that this process has not been handed yet, at most ``limit``.

        First those that were proposed and are open: left by a process that was killed, or released. Then new ones.
        Methods that learn by generations (cmaes; evolution and Optuna's, if ``settings.synchronous``) propose a
        generation when all members of earlier ones are done, and store it whole. The others (random, grid, qmc; all
        but cmaes, if not synchronous) propose as many as are asked for, of what is done by now; with no limit,
        ``settings.generation``. An empty list while members are out: tell some first; see ``finished``.
        """
        count = self.settings.generation if limit is None else limit
        handed = self._hand_out(limit)
        more = limit is None or len(handed) < limit
        if more and (new := self._next(count - len(handed))):
            self._propose(new)
            handed += self._hand_out(None if limit is None else limit - len(handed))
        return handed

    def release(self, trial: int) -> None:
        """A member handed out was lost with its worker: ``ask`` offers it again.

        Raises ValueError for a trial that is not out.
        """
        if trial not in self._out:
            raise ValueError(f"{self._where}: trial {trial} is not out")
        self._out.remove(trial)
        self._waiting = sorted([*self._waiting, trial])

    def tell(self, trial: int, *, fitness: float, attributes: Mapping[str, Any]) -> None:
        """Complete a member: its fitness, to be maximised, and facts to keep that JSON can hold.

        Raises ValueError for a fitness that is not finite, and for a trial that is unknown or done.
        """
        if not math.isfinite(fitness):
            raise ValueError(f"search: trial {trial}'s fitness is {fitness}: fail it instead")
        self._finish(trial, "complete", fitness=float(fitness), attributes=attributes)

    def fail(self, trial: int, *, reason: str, attributes: Mapping[str, Any] | None = None) -> None:
        """End a member without fitness: it counts as done, is never a parent, and keeps the reason.

        Raises ValueError for a trial that is unknown or done.
        """
        self._finish(trial, "failed", attributes={**(attributes or {}), "reason": reason})

    def prune(
        self, trial: int, *, rungs: Sequence[tuple[int, float]], attributes: Mapping[str, Any]
    ) -> None:
        """End a member whose training was stopped early: it counts as done, and is never a parent.

        ``rungs``: (step, fitness there) of each time that it was judged, the last one where it ended; Optuna's pruners
        leave a trial of state PRUNED with such intermediate values.

        Raises ValueError for no rung, a fitness that is not finite, and a trial that is unknown or done.
        """
        if not rungs or not all(math.isfinite(fitness) for _, fitness in rungs):
            raise ValueError(f"search: trial {trial} is pruned with rungs {list(rungs)}")
        reached = tuple(sorted((int(step), float(fitness)) for step, fitness in rungs))
        self._finish(trial, "pruned", rungs=reached, attributes=attributes)

    def members(self) -> list[MemberRecord]:
        """All members that are done, by trial number."""
        return [trial for trial in self._trials if isinstance(trial, MemberRecord)]

    def best(self) -> MemberRecord:
        """The fittest member, the earliest among equals; raises ValueError where none completed."""
        complete = [member for member in self.members() if member.fitness is not None]
        if not complete:
            raise ValueError(f"{self._where}: no member of this study completed")
        return max(complete, key=lambda member: (member.fitness, -member.trial))

    @property
    def waits(self) -> bool:
        """Whether a generation is proposed only when all members of earlier ones are done."""
        return self._sampler.generation(0) is not None

    def open_members(self) -> list[Proposal]:
        """All members that were proposed and are not done, by trial number."""
        return [trial for trial in self._trials if not isinstance(trial, MemberRecord)]

    def parents(self) -> list[MemberRecord]:
        """The members done that any member to come may be made from; none where none is made from another."""
        sampler = self._sampler
        return sampler.population(self.members()) if isinstance(sampler, EvolutionSampler) else []

    def generation(self, number: int) -> range:
        """The numbers of the members that are proposed, or may be compared, with member ``number``."""
        found = self._sampler.generation(number) or generation_of(number, settings=self.settings)
        return range(found.start, min(found.stop, self.total))

    def _hand_out(self, limit: int | None) -> list[Proposal]:
        taken = [n for n in self._waiting if n < self.total][:limit]
        self._waiting = self._waiting[len(taken) :]
        self._out.update(taken)
        return [self._trials[number] for number in taken]

    def _next(self, count: int) -> range:
        """The numbers to propose now; empty where members must be told first."""
        begin = len(self._trials)
        if begin >= self.total:
            return range(0)
        generation = self._sampler.generation(begin)
        if generation is None:
            return range(begin, min(begin + max(count, 0), self.total))
        if not self._all_done_below(generation.start):
            return range(0)
        return range(begin, generation.stop)

    def _propose(self, numbers: range) -> None:
        generation = self._sampler.generation(numbers.start)
        # What members of the same generation came to would depend on which of them were first.
        known = self._trials if generation is None else self._trials[: generation.start]
        done = [trial for trial in known if isinstance(trial, MemberRecord)]
        pending = [trial for trial in known if not isinstance(trial, MemberRecord)]
        pending += self._trials[len(known) :]
        new: list[Proposal] = []
        for number in numbers:
            new.append(self._sampler.propose(number, done=done, pending=pending + new))
        if self._storage is not None:
            self._storage.add(new)
        self._trials += new
        self._waiting += numbers

    def _all_done_below(self, stop: int) -> bool:
        while self._first_open < len(self._trials) and isinstance(
            self._trials[self._first_open], MemberRecord
        ):
            self._first_open += 1
        return self._first_open >= stop

    def _finish(
        self,
        number: int,
        state: State,
        *,
        attributes: Mapping[str, Any],
        fitness: float | None = None,
        rungs: tuple[tuple[int, float], ...] = (),
    ) -> None:
        if not 0 <= number < len(self._trials):
            raise ValueError(f"{self._where}: no trial {number} was asked for")
        trial = self._trials[number]
        if isinstance(trial, MemberRecord):
            raise ValueError(f"{self._where}: trial {number} is done already")
        if taken := set(attributes) & set(LINEAGE):
            raise ValueError(f"search: attributes {sorted(taken)} are the study's own")
        member = MemberRecord(
            **{field.name: getattr(trial, field.name) for field in fields(Proposal)},
            state=state,
            fitness=fitness,
            # As it will be read.
            attributes=json.loads(json.dumps(dict(attributes))),
            partial=rungs[-1][1] if rungs else None,
            rungs=rungs,
        )
        if self._storage is not None:
            self._storage.finish(member)
        self._trials[number] = member
        self._out.discard(number)
        if number in self._waiting:
            self._waiting.remove(number)
